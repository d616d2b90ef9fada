"""Encoding a corpus: ragjax against sentence-transformers at its best batch size, on the same passages in turns.

    make test-parity        # makes the environment that has both
    .venv-parity/bin/python experiments/benchmarks/encoding.py --data=$RAGJAX_DATA/popqa --embedder=minilm --out=FILE

Both get the same texts and give unit vectors, which are compared. Turns alternate, so that what else the machine does
falls on both; the ratio is of the median turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from provenance import provenance
from sentence_transformers import SentenceTransformer

from ragjax.costs import forward_flops
from ragjax.data import load_dataset
from ragjax.files import write_json
from ragjax.pretrained import load_embedder

BATCH_SIZES = (4, 8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--embedder", default="minilm")
    parser.add_argument("--passages", type=int, default=512, help="so many, evenly spread over the corpus")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    store = load_dataset(flags.data).passages
    texts = [store[row].embedder_text for row in np.linspace(0, len(store) - 1, flags.passages).astype(int)]
    ours = load_embedder(flags.embedder)
    theirs = SentenceTransformer(str(ours.source.path), device="cpu", local_files_only=True)
    tokens = ours.passage_tokens(texts)
    sides: dict[str, Callable[[], np.ndarray]] = {"ragjax": lambda: ours.encode_passages(texts)}
    for size in BATCH_SIZES:
        sides[f"sentence-transformers, {size}"] = lambda size=size: theirs.encode(
            texts, batch_size=size, normalize_embeddings=True, show_progress_bar=False
        )
    vectors = {name: encode() for name, encode in sides.items()}  # also compiles
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(flags.turns):
        for name, encode in sides.items():
            time.sleep(0.5)  # a library's threads spin for a while after its work
            began = time.perf_counter()
            encode()
            seconds[name].append(time.perf_counter() - began)
    took = {name: statistics.median(values) for name, values in seconds.items()}
    best = min((name for name in took if name != "ragjax"), key=took.__getitem__)
    flops = forward_flops(ours.size, list(map(len, tokens)), 0)
    result = {
        **provenance("sentence-transformers", "torch"),
        "model": ours.describe(),
        "passages": len(texts),
        "tokens": sum(map(len, tokens)),
        "passages_per_second": {name: len(texts) / value for name, value in took.items()},
        "real_gflops_per_second": {name: flops / value / 1e9 for name, value in took.items()},
        "best_batch_size": best,
        "ratio": took[best] / took["ragjax"],
        "largest_difference": float(max(np.abs(vectors["ragjax"] - v).max() for v in vectors.values())),
    }
    write_json(flags.out, result)
    print({name: round(value, 1) for name, value in result["passages_per_second"].items()}, round(result["ratio"], 3))


if __name__ == "__main__":
    main()
