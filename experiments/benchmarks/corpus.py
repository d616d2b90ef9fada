"""A corpus of many passages through prepare, store and index, in three sizes, and what they say of 29.9 million.

    python experiments/benchmarks/corpus.py --work=runs/corpus --out=experiments/results/corpus.json

Passages are 100 words drawn from MiniLM's vocabulary, in DPR's table; the embedder is one layer of 32 numbers cut out
of MiniLM with its whole tokenizer, so that what is measured is everything but the network. Each command is a process
of its own, whose peak memory the system tells. What grows with the corpus is fitted by a line through the sizes.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance
from safetensors.numpy import load_file, save_file

from ragjax.files import write_json
from ragjax.weights import resolve_model

WIDTH, WORDS = 32, 100
PAPER = 29_900_000  # passages of MedRAG's corpus, from which the paper retrieves
# A process of its own, because what it starts counts as no smaller than itself.
WATCHING = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""
OPENING = """
import sys, time
import ragjax.data.arrow as arrow
arrow.ArrowStore  # imported
import pyarrow
began = time.perf_counter()
store = arrow.ArrowStore(sys.argv[1] + "/corpus")
opened = time.perf_counter()
rows = [i * 7919 % len(store) for i in range(1000)]
for row in rows:
    store[row]
print(opened - began, (time.perf_counter() - opened) / 1000)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="100000,300000,1000000", help="passages, separated by commas")
    parser.add_argument("--index", default="IVF256,Flat", help="FAISS factory string")
    parser.add_argument("--work", type=Path, required=True, help="new folder for corpora and indexes")
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    embedder = flags.work / "embedder"
    cut_embedder(embedder)
    measured = {}
    for size in map(int, flags.sizes.split(",")):
        measured[str(size)] = measure(flags.work / str(size), size, embedder, flags.index)
        print(size, json.dumps(measured[str(size)]), flush=True)
    made = {**provenance("pyarrow", "faiss-cpu"), "index": flags.index}
    write_json(flags.out, {**made, "sizes": measured, "paper": extrapolated(measured)})


def measure(folder: Path, size: int, embedder: Path, factory: str) -> dict[str, dict[str, float]]:
    """Seconds, peak memory and disk of each step, in a folder of its own."""
    source, data, index = (folder / name for name in ("source", "data", "index"))
    write_source(source, size)
    over = [f"--data={data}", f"--index_dir={index}", f"--embedder={embedder}"]
    steps = {
        "prepare": [f"--source={source}", f"--out={data}"],
        "index": [*over, f"--index={factory}"],
        "evaluate": [*over, "--split=dev", "--decode=none", f"--out={folder / 'scores'}"],
    }
    found = {name: run([sys.executable, "-m", f"ragjax.{name}", *given]) for name, given in steps.items()}
    found["prepare"]["disk_bytes"], found["index"]["disk_bytes"] = bytes_of(data), bytes_of(index)
    done = subprocess.run([sys.executable, "-c", OPENING, str(data)], capture_output=True, text=True, check=True)
    opening, row = map(float, done.stdout.split())
    return {**found, "open": {"seconds": opening, "seconds_per_passage_read": row}}


def run(command: Sequence[str]) -> dict[str, float]:
    """A command to its end: its seconds and its peak memory, pages of mapped files included."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", WATCHING, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return {"seconds": time.perf_counter() - began, "peak_bytes": 1024 * int(done.stdout)}


def write_source(folder: Path, size: int) -> None:
    """DPR's layout: a table of passages, and ten questions that are the first words of ten of them."""
    draw = random.Random(0)
    words = [line for line in (resolve_model("minilm").path / "vocab.txt").read_text("utf-8").split() if line.isalpha()]
    folder.mkdir(parents=True)
    questions = []
    with open(folder / "psgs_w100.tsv", "w", encoding="utf-8") as file:
        file.write("id\ttext\ttitle\n")
        for number in range(1, size + 1):
            text = " ".join(draw.choices(words, k=WORDS))
            file.write(f"{number}\t{text}\tPage {number // 5}\n")
            if number % (size // 10) == 0:
                start = " ".join(text.split()[:20])
                positives = [{"passage_id": str(number), "title": f"Page {number // 5}", "text": text}]
                questions.append({"question": start, "answers": [start], "positive_ctxs": positives})
    (folder / "biencoder-dev.json").write_text(json.dumps(questions), encoding="utf-8")


def cut_embedder(folder: Path) -> None:
    """MiniLM's first layer and the first numbers of every state, with its tokenizer."""
    source = resolve_model("minilm")
    folder.mkdir(parents=True)
    for path in source.path.iterdir():
        if path.name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 1}
    (folder / "config.json").write_text(json.dumps(config))
    kept = {}
    for name, weights in load_file(source.files[0]).items():
        if ("layer." in name and "layer.0." not in name) or name == "embeddings.position_ids":
            continue
        is_table = name.startswith("embeddings.") and weights.ndim == 2
        kept[name] = weights[:, :WIDTH] if is_table else weights[tuple(slice(WIDTH) for _ in weights.shape)]
    save_file({name: np.ascontiguousarray(weights) for name, weights in kept.items()}, folder / "model.safetensors")


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def extrapolated(measured: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Each figure at the paper's number of passages, by the line through the sizes that fits best."""
    sizes = np.array([int(size) for size in measured], np.float64)
    first = next(iter(measured.values()))
    return {
        step: {
            name: float(np.polyval(np.polyfit(sizes, [each[step][name] for each in measured.values()], 1), PAPER))
            for name in figures
            if name != "seconds_per_passage_read"
        }
        for step, figures in first.items()
    }


if __name__ == "__main__":
    main()
