"""Evaluation: retrieve, decode greedily from the concatenated passages, score, and write one line a question."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ragjax import metrics
from ragjax.costs import Cost, decode_flops, forward_flops
from ragjax.data.questions import Question
from ragjax.errors import UserError
from ragjax.evaluation.generations import CachedGenerations
from ragjax.evaluation.report import METRICS, mean_interval, scores_table
from ragjax.files import append_line, read_json, write_atomic, write_json
from ragjax.pipeline import SUMMARY_FILE, Pipeline, open_run, probabilities
from ragjax.retrieval import PassageStore

# Recall and hit are reported at 5 whatever --top_k is.
_RECALL_K = 5


def evaluate(
    pipeline: Pipeline,
    questions: Sequence[Question],
    path: Path,
    *,
    top_k: int,
    score_scale: float,
    max_new_tokens: int,
    batch_size: int,
    generations: CachedGenerations | None = None,
) -> tuple[list[dict[str, Any]], Cost]:
    """Predictions for `questions`, in their order, and what they cost; both are also written beside `path`.

    A finished file is read back. Batches that are done are kept in `<path>.partial`, so a run that was killed
    goes on behind them: batches are formed from the questions alone, hence the same ones.

    Args:
      pipeline: the models to evaluate.
      questions: what is asked.
      path: the predictions file (.jsonl); a line is {id, question, prediction, answers, em, f1, contains,
        recall_at_5, hit_at_5, passages: [{id, probability}]}. The cost goes to <path>.cost.json.
      top_k: passages in the prompt.
      score_scale: of the passages' probabilities.
      max_new_tokens: longest answer.
      batch_size: questions decoded at once.
      generations: answers of this pipeline's generator that may be there already.
    """
    if path.exists():
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        spent = read_json(_cost_file(path))
        pipeline.prompts.passages_cut.update(spent.pop("passages_cut", []))
        return records, Cost(**spent)
    began = time.perf_counter()
    texts = [question.question for question in questions]
    width = min(max(top_k, _RECALL_K), len(pipeline.store))
    retrieved = pipeline.retrieve(texts, width)
    prompts = [
        pipeline.concatenated_prompt(text, rows[:top_k], max_new_tokens)
        for text, rows in zip(texts, retrieved.rows, strict=True)
    ]
    lengths = list(map(len, pipeline.embedder.tokenize(texts)))
    retrieval_flops = forward_flops(pipeline.embedder.size, lengths, 0)
    cost = Cost(time.perf_counter() - began, retrieval_flops, sum(lengths))
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(questions)), key=lambda i: (len(prompts[i]), i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    finished = _read_partial(path, [[questions[i].id for i in batch] for batch in batches])
    records: dict[int, dict[str, Any]] = {}
    for number, batch in enumerate(tqdm(batches, desc=f"answering ({path.stem})", unit="batch", dynamic_ncols=True)):
        if number < len(finished):
            batch_records, batch_cost = finished[number]
        else:
            began = time.perf_counter()
            chosen = [prompts[i] for i in batch]
            source = pipeline.generator if generations is None else generations
            answers = source.generate_tokens(chosen, max_new_tokens, batch_size)
            batch_cost = _decoding_cost(pipeline, chosen, answers, time.perf_counter() - began)
            batch_records = []
            for i, tokens in zip(batch, answers, strict=True):
                ids = pipeline.store.ids_of(retrieved.rows[i])
                shares = probabilities(retrieved.scores[i][:top_k], score_scale)
                batch_records.append(_record(questions[i], pipeline.prediction(tokens), ids, shares))
            _append_partial(path, batch_records, batch_cost)
        records.update(zip(batch, batch_records, strict=True))
        cost += batch_cost
    lines = [json.dumps(records[i], ensure_ascii=False) + "\n" for i in range(len(questions))]
    cut = sorted(pipeline.prompts.passages_cut)
    write_json(_cost_file(path), {**dataclasses.asdict(cost), "passages_cut": cut})
    write_atomic(path, "".join(lines))
    _partial(path).unlink(missing_ok=True)
    return [records[i] for i in range(len(questions))], cost


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Mean of each metric over the questions that have it; None where none has."""
    return {name: metrics.mean_of_defined(record[name] for record in records) for name in METRICS}


def mean_recall(store: PassageStore, questions: Sequence[Question], rows: np.ndarray) -> float | None:
    """Recall@5 of what was found, rows [n, k >= 5] best first; None where no question has labelled passages."""
    return metrics.mean_of_defined(
        metrics.recall_at_k(store.ids_of(found), question.positive_ids, _RECALL_K)
        for question, found in zip(questions, rows, strict=True)
    )


def _record(question: Question, prediction: str, ids: Sequence[str], shares: np.ndarray) -> dict[str, Any]:
    """One line of the predictions file; `ids` may hold more passages than the prompt had."""
    answers, positives = question.answers, question.positive_ids
    return {
        "id": question.id,
        "question": question.question,
        "prediction": prediction,
        "answers": list(answers),
        "em": metrics.exact_match(prediction, answers),
        "f1": metrics.f1(prediction, answers),
        "contains": metrics.contains_answer(prediction, answers),
        "recall_at_5": metrics.recall_at_k(ids, positives, _RECALL_K),
        "hit_at_5": metrics.hit_at_k(ids, positives, _RECALL_K),
        "passages": [{"id": passage, "probability": float(share)} for passage, share in zip(ids, shares, strict=False)],
    }


def _decoding_cost(
    pipeline: Pipeline, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], seconds: float
) -> Cost:
    prompt_lengths, answer_lengths = list(map(len, prompts)), list(map(len, answers))
    flops = decode_flops(pipeline.generator.size, prompt_lengths, answer_lengths)
    return Cost(seconds, flops, sum(prompt_lengths) + sum(answer_lengths))


def _cost_file(path: Path) -> Path:
    return path.with_suffix(".cost.json")


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _append_partial(path: Path, records: Sequence[Mapping[str, Any]], cost: Cost) -> None:
    append_line(_partial(path), json.dumps([records, dataclasses.asdict(cost)]))


def _read_partial(path: Path, batches: Sequence[Sequence[str]]) -> list[tuple[list[dict[str, Any]], Cost]]:
    """The first of `batches` (question ids) that are done already.

    A last line that a kill has cut off is dropped, and so is what an evaluation with other batches left.
    """
    if not _partial(path).exists():
        return []
    lines = _partial(path).read_text(encoding="utf-8").splitlines(keepends=True)
    kept, finished = [], []
    for line, batch in zip(lines, batches, strict=False):
        records, cost = json.loads(line) if line.endswith("\n") else ([], {})
        if [record["id"] for record in records] != batch:
            break
        kept.append(line)
        finished.append((records, Cost(**cost)))
    if len(kept) < len(lines):
        write_atomic(_partial(path), "".join(kept))
    return finished


def evaluate_run(run_dir: str, split: str, limit: int, batch_size: int, predictions: str) -> None:
    """Evaluates the trained pipeline of a run folder on a split and prints its scores.

    Args:
      run_dir: folder of the run.
      split: train, dev or test.
      limit: first N questions; 0: all.
      batch_size: questions decoded at once.
      predictions: file to write; "" for <run_dir>/predictions/<split>.after.jsonl.

    Raises:
      UserError: no such run or split, an unfinished run, or the predictions file holds another number of questions.
    """
    path = Path(predictions) if predictions else Path(run_dir) / "predictions" / f"{split}.after.jsonl"
    run = open_run(run_dir)
    if not predictions and not (Path(run_dir) / SUMMARY_FILE).is_file():
        # Training would take the figures of today's checkpoint for those of its end.
        raise UserError(f"{run_dir} is not finished: repeat its ragjax.train command, or give --predictions a file.")
    questions = getattr(run.dataset, split)[: limit or None]
    if not questions:
        raise UserError(f"{run.dataset.folder} has no {split} questions: choose another --split.")
    records, cost = evaluate(
        run.pipeline,
        questions,
        path,
        top_k=run.config.top_k,
        score_scale=run.config.score_scale,
        max_new_tokens=run.config.max_new_tokens,
        batch_size=batch_size,
    )
    if [record["id"] for record in records] != [question.id for question in questions]:
        raise UserError(
            f"{path} holds predictions for {len(records)} other questions: give --predictions another file, or the "
            f"--eval_limit that it was made with."
        )
    print(f"\n{run_dir} at step {run.step}, {len(records)} {split} questions ({path})\n")
    intervals = {
        name: mean_interval([record[name] for record in records if record[name] is not None]) for name in METRICS
    }
    print(scores_table(intervals))
    print(f"\n{cost.seconds:,.1f} s, {cost.tokens:,} tokens, {cost.flops / 1e12:,.2f} TFLOPs")
