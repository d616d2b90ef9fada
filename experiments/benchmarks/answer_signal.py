"""What answers say of passages: how often the passage under which the answer is likeliest is a labelled one.

    python experiments/benchmarks/answer_signal.py --generator_run=GENERATOR --split=dev --top_k=5 --out=FILE

A retriever that learns from answers (RAG-Token, RAG-Sequence, the distillation losses) moves towards passages under
which the answer is likely. Where those are not the labelled ones, no rate and no loss of that kind raises Recall@k. Of
each labelled question with both kinds of passages among its K:

likelihood     log p(y|x, z) alone puts a labelled passage first
posterior      p(z|x) p(y|x, z) does
retriever      p(z|x) alone does
leave one out  the answer's likelihood falls most without a labelled passage (Izacard et al. 2022, "LOOP")
chance         a passage drawn from the K is a labelled one
"""

import argparse
from pathlib import Path

import numpy as np
from provenance import provenance

from ragjax.data.questions import Question
from ragjax.files import write_json
from ragjax.runs import Run, open_run
from ragjax.voice import progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator_run", required=True, help="finished run of the strategy generator")
    parser.add_argument("--split", default="train")
    parser.add_argument("--limit", type=int, default=300, help="first questions of the split")
    parser.add_argument("--top_k", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    run = open_run(flags.generator_run)
    questions = getattr(run.dataset, flags.split)[: flags.limit]
    found = run.retrieve([question.question for question in questions], flags.top_k)
    shown = []
    for question, rows, scores in progress(
        zip(questions, found.passage_rows, found.scores, strict=True), total=len(questions), unit=" questions"
    ):
        gold = np.isin(rows, run.pipeline.store.rows_of(question.positive_ids))
        if gold.any() and not gold.all():
            shown.append(firsts(run, question, rows, scores, gold))
    result = {
        **provenance(),
        "data": {"name": run.dataset.name, "sha256": run.dataset.sha256, "split": flags.split},
        "models": [run.embedder.describe(), run.generator.describe()],
        "top_k": flags.top_k,
        "questions": {"asked": len(questions), "with both kinds of passages": len(shown)},
        "labelled passages of a question": np.mean([len(question.positive_ids) for question in questions]),
        "a labelled passage first": {name: shares([one[name] for one in shown]) for name in shown[0]},
    }
    write_json(flags.out, result)


def firsts(run: Run, question: Question, rows: np.ndarray, scores: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """Of one question with passages [K]: whether each order puts a labelled one first, and the chance of it."""
    builder = run.pipeline.prompts
    passages = run.pipeline.passages(rows)
    answer = builder.answer(question.answers[0])
    alone = [[passage] for passage in passages]
    others = [[*passages[:k], *passages[k + 1 :]] for k in range(len(passages))]
    prompts = [builder.prompt(group, question.question, len(answer)).ids for group in (*alone, *others)]
    sums = np.array([row.sum() for row in run.generator.score_tokens(prompts, [answer] * len(prompts))])
    likelihoods, without = sums[: len(rows)], sums[len(rows) :]
    weighted = run.config.score_scale * scores.astype(np.float64)
    orders = {
        "likelihood": likelihoods,
        "posterior": weighted + likelihoods,
        "retriever": weighted,
        "leave one out": -without,
    }
    return {name: float(gold[np.argmax(order)]) for name, order in orders.items()} | {"chance": float(gold.mean())}


def shares(values: list[float]) -> dict[str, float]:
    """Mean and standard error."""
    return {"share": float(np.mean(values)), "se": float(np.std(values, ddof=1) / len(values) ** 0.5)}


if __name__ == "__main__":
    main()
