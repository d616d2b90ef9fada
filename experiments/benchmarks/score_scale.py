"""Which --score_scale explains the answers best before anything is trained?

    python experiments/benchmarks/score_scale.py --questions=48 --out=experiments/results/score_scale.sample.json

Scores the dev answers once under each of the top-5 passages, then computes both losses for every scale from the same
log-probabilities, so that the scales differ in nothing else. Prints the loss per answer and the entropy of p(z|x).
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np
from provenance import provenance

from ragjax import losses
from ragjax.config import RunConfig
from ragjax.data.dataset import load_dataset
from ragjax.files import write_json
from ragjax.pipeline import build_pipeline, load_models

SCALES = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 50.0, 100.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    config = RunConfig(data=flags.data, lora_rank=0)
    dataset = load_dataset(config.data)
    pipeline = build_pipeline(config, dataset, *load_models(config))
    questions = dataset.dev[: flags.questions]
    retrieved = pipeline.retrieve([question.question for question in questions], config.top_k)
    answers = [pipeline.prompts.answer(question.answers[0]) for question in questions]
    prompts = [
        pipeline.prompts.prompt([passage], question.question, reserve=len(answer)).ids
        for question, answer, rows in zip(questions, answers, retrieved.passage_rows, strict=True)
        for passage in pipeline.passages(rows)
    ]
    scores = pipeline.generator.score_tokens(prompts, [a for a in answers for _ in range(config.top_k)])
    mask = np.arange(max(map(len, answers))) < np.asarray([[len(answer)] for answer in answers])
    answer_log_probs = np.zeros((len(questions), config.top_k, mask.shape[1]), np.float32)
    for i, score in enumerate(scores):
        answer_log_probs[i // config.top_k, i % config.top_k, : len(score)] = score
    table = [_row(scale, retrieved.scores, answer_log_probs, mask) for scale in SCALES]
    for row in table:
        print("  ".join(f"{name} {value:7.3f}" for name, value in row.items()))
    result = {
        **provenance(),
        "config": {key: value for key, value in dataclasses.asdict(config).items() if key != "run_dir"},
        "questions": len(questions),
        "scales": table,
    }
    write_json(flags.out, result)


def _row(scale: float, scores: np.ndarray, answer_log_probs: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    docs = jax.nn.log_softmax(scale * scores, axis=-1)
    return {
        "scale": scale,
        "rag_token_nll": float(losses.rag_token_nll(docs, answer_log_probs, mask).mean()),
        "rag_sequence_nll": float(losses.rag_sequence_nll(docs, answer_log_probs, mask).mean()),
        "retrieval_entropy": float(-(np.exp(docs) * docs).sum(axis=-1).mean()),
    }


if __name__ == "__main__":
    main()
