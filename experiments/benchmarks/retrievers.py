"""What finds passages: Recall@1, 5, 10 and 20, MRR@10 and seconds a question of several ways, on the dev questions.

    python experiments/benchmarks/retrievers.py --data=$RAGJAX_DATA/popqa --out=FILE

Recall@k is that of the k passages which a way proposes when it is asked for k, best first by their vectors, as a run
reads them. The untrained embedder's vectors are encoded before, or come from the cache; an index of words is built
before. Seconds are those of one search for all questions at k = 5, the embedder's work included; programs are compiled
before, except for the generator's. Re-ranking by the
generator is slow, so that way, and dense and hybrid search beside it, is measured on the first questions.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance

from ragjax import metrics
from ragjax.config import RunConfig
from ragjax.data import load_dataset
from ragjax.data.questions import Question
from ragjax.files import write_json
from ragjax.pipeline import Pipeline, build_pipeline, load_untrained_embedder, load_untrained_generator

RANKS = (1, 5, 10, 20)
READ = 5
WAYS: dict[str, dict[str, Any]] = {
    "dense": {},
    "bm25": {"retriever": "bm25"},
    "hybrid": {"retriever": "hybrid"},
    "dense, hops=2": {"hops": 2},
    "hybrid, hops=2": {"retriever": "hybrid", "hops": 2},
}
# On the first questions alone.
SLOW_WAYS: dict[str, dict[str, Any]] = {
    "dense": {},
    "hybrid": {"retriever": "hybrid"},
    "hybrid, rerank=generator": {"retriever": "hybrid", "rerank": "generator"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample")
    parser.add_argument("--rerank_top", type=int, default=10, help="passages that the generator looks at")
    parser.add_argument("--reranked", type=int, default=50, help="the first questions, whose passages are re-ranked")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    flags = parser.parse_args()
    dataset = load_dataset(flags.data)
    plain = RunConfig(strategy="none", lora_rank=0, data=flags.data, decode="none")
    embedder, generator = load_untrained_embedder(plain), load_untrained_generator(plain)
    labelled = [question for question in dataset.dev if question.positive_ids]
    result: dict[str, Any] = {
        **provenance("bm25s", "faiss-cpu"),
        "data": {"name": dataset.name, "sha256": dataset.sha256, "split": "dev", "passages": len(dataset.passages)},
        "embedder": embedder.describe(),
        "generator": generator.describe(),
        "rerank_top": flags.rerank_top,
    }
    for part, ways, asked in (("all", WAYS, labelled), ("first", SLOW_WAYS, labelled[: flags.reranked])):
        result[part] = {"questions": len(asked), "ways": {}}
        for name, changes in ways.items():
            config = RunConfig(
                strategy="none", lora_rank=0, data=flags.data, decode="none", rerank_top=flags.rerank_top, **changes
            )
            pipeline = build_pipeline(config, dataset, embedder, generator)
            # The generator looks at 10: of more passages there is no choice.
            ranks = [rank for rank in RANKS if not config.rerank or rank <= flags.rerank_top]
            result[part]["ways"][name] = measure(pipeline, asked, ranks, bool(config.rerank))
            write_json(flags.out, result)
            print(part, name, result[part]["ways"][name], flush=True)


def measure(pipeline: Pipeline, asked: list[Question], ranks: list[int], reranked: bool) -> dict[str, float]:
    texts = [question.question for question in asked]
    if not reranked:  # which keeps its scores, so that only the first search tells what one takes
        pipeline.retrieve(texts, READ)
    began = time.perf_counter()
    pipeline.retrieve(texts, READ)
    seconds = time.perf_counter() - began
    found = pipeline.retrieve_each(texts, ranks)
    ids = {k: [pipeline.store.ids_of(rows) for rows in found[k].passage_rows] for k in ranks}
    positives = [question.positive_ids for question in asked]
    recalls = {
        f"recall_at_{k}": float(
            np.mean([metrics.recall_at_k(*pair, k) for pair in zip(ids[k], positives, strict=True)])
        )
        for k in ranks
    }
    ranking = [metrics.reciprocal_rank(*pair, 10) for pair in zip(ids[10], positives, strict=True)]
    return {**recalls, "mrr_at_10": float(np.mean(ranking)), "seconds_per_question": seconds / len(asked)}


if __name__ == "__main__":
    main()
