"""Evaluation: retrieve, decode, score, and write one line a question."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ragjax import metrics
from ragjax.checkpoints import tree_sha256
from ragjax.config import DecodeConfig, RunConfig
from ragjax.costs import Cost, decode_flops, forward_flops
from ragjax.data.questions import Question
from ragjax.errors import UserError
from ragjax.evaluation.generations import CachedGenerations
from ragjax.evaluation.report import METRICS
from ragjax.files import append_line, read_json, read_json_lines, read_whole_lines, write_atomic, write_json
from ragjax.generation import Decoded, Prepared, question_seeds
from ragjax.pipeline import Pipeline, probabilities
from ragjax.retrieval import PassageStore
from ragjax.voice import progress

# Recall and hit are reported at 5 whatever --top_k is, and the reciprocal rank at 10.
_RECALL_K = 5
_RANK_K = 10
# What else of the configuration makes a prompt and weighs its passages.
_READ_AS = ("top_k", "score_scale", "prompt", "max_passage_tokens")


def evaluate(
    pipeline: Pipeline,
    questions: Sequence[Question],
    path: Path,
    config: RunConfig,
    *,
    generations: CachedGenerations | None = None,
    passage_answers: bool = False,
) -> tuple[list[dict[str, Any]], Cost]:
    """Predictions for `questions`, in their order, and what they cost; both are also written beside `path`.

    A finished file is read back. Batches that are done are kept in `<path>.partial`, so a run that was killed
    goes on behind them: batches are formed from the questions alone, hence the same ones.

    Args:
      pipeline: the models to evaluate.
      questions: what is asked.
      path: the predictions file (.jsonl); a line is {id, question, prediction, log_prob, answers, em, f1, contains,
        recall_at_5, hit_at_5, mrr_at_10, answer_in_context, passages: [{id, probability}]}, with recall and hit at
        top_k too where that is not 5. answer_in_context is at top_k: of what the generator could read.
      config: top_k, score_scale, eval_batch_size, and how answers are decoded.
      generations: answers of this pipeline's generator that may be there already.
      passage_answers: also the greedy answer under each passage by itself, as "answer" of its entry in passages.

    Raises:
      UserError: the file holds other predictions, cannot be written, or a question does not fit the window.
    """
    identity = _identity(pipeline, questions, config, passage_answers)
    if path.exists():
        spent = read_json(_cost_file(path))
        if spent.pop("made_from", None) != identity:
            raise UserError(
                f"{path} holds predictions of other models, questions or settings: move it away or write elsewhere."
            )
        records = read_json_lines(path)
        pipeline.prompts.passages_cut.update(spent.pop("passages_cut"))
        return records, Cost(**spent)
    began = time.perf_counter()
    texts = [question.question for question in questions]
    top_k, batch_size = config.top_k, config.eval_batch_size
    width = min(max(top_k, _RANK_K), len(pipeline.store))
    retrieved = pipeline.retrieve(texts, width)
    asked = [
        pipeline.decoding_prompts(text, rows[:top_k], scores[:top_k], config)
        for text, rows, scores in zip(texts, retrieved.rows, retrieved.scores, strict=True)
    ]
    lengths = list(map(len, pipeline.embedder.query_tokens(texts)))
    retrieval_flops = forward_flops(pipeline.embedder.size, lengths, 0)
    cost = Cost(time.perf_counter() - began, retrieval_flops, sum(lengths))
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(questions)), key=lambda i: (max(map(len, asked[i][0])), i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    finished = _read_partial(path, identity, [[questions[i].id for i in batch] for batch in batches])
    source = pipeline.generator.prepared() if generations is None else generations
    records: dict[int, dict[str, Any]] = {}
    for number, batch in enumerate(progress(batches, desc=f"answering ({path.stem})", unit="batch")):
        if number < len(finished):
            batch_records, batch_cost = finished[number]
        else:
            began = time.perf_counter()
            prompts = [asked[i][0] for i in batch]
            seeds = question_seeds(config, batch)
            weights = np.stack([asked[i][1] for i in batch])
            answers = source.decode_answers(prompts, weights, config, batch_size, seeds)
            batch_cost = _decoding_cost(pipeline, prompts, answers, time.perf_counter() - began)
            batch_records = [
                _record(pipeline, questions[i], answer, retrieved.rows[i], retrieved.scores[i], config)
                for i, answer in zip(batch, answers, strict=True)
            ]
            if passage_answers:
                batch_cost += _add_passage_answers(
                    pipeline, source, [texts[i] for i in batch], retrieved.rows[batch], config, batch_records
                )
            _append_partial(path, identity, batch_records, batch_cost)
        records.update(zip(batch, batch_records, strict=True))
        cost += batch_cost
    lines = [json.dumps(records[i], ensure_ascii=False) + "\n" for i in range(len(questions))]
    cut = sorted(pipeline.prompts.passages_cut)
    write_json(_cost_file(path), {**dataclasses.asdict(cost), "passages_cut": cut, "made_from": identity})
    write_atomic(path, "".join(lines))
    _partial(path).unlink(missing_ok=True)
    return [records[i] for i in range(len(questions))], cost


def holds(
    path: Path, pipeline: Pipeline, questions: Sequence[Question], config: RunConfig, passage_answers: bool
) -> bool:
    """Whether `path` has these predictions already."""
    if not path.exists():
        return False
    return read_json(_cost_file(path)).get("made_from") == _identity(pipeline, questions, config, passage_answers)


def _identity(
    pipeline: Pipeline, questions: Sequence[Question], config: RunConfig, passage_answers: bool
) -> dict[str, Any]:
    """What predictions depend on."""
    fields = [field.name for field in dataclasses.fields(DecodeConfig)]
    asked = json.dumps([dataclasses.astuple(question) for question in questions])
    return {
        **{name: getattr(config, name) for name in (*fields, *_READ_AS)},
        "passage_answers": passage_answers,
        "questions": hashlib.sha256(asked.encode()).hexdigest(),
        "corpus": pipeline.store.content_hash,
        "embedder": f"{pipeline.embedder.key} {tree_sha256(pipeline.embedder.params)}",
        "generator": pipeline.generator.key,
    }


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Mean of each metric over the questions that have it; None where none has."""
    return {name: metrics.mean_of_defined(record[name] for record in records) for name in METRICS}


def mean_recall(store: PassageStore, questions: Sequence[Question], rows: np.ndarray) -> float | None:
    """Recall@5 of what was found, rows [n, k >= 5] best first; None where no question has labelled passages."""
    return metrics.mean_of_defined(
        metrics.recall_at_k(store.ids_of(found), question.positive_ids, _RECALL_K)
        for question, found in zip(questions, rows, strict=True)
    )


def _record(
    pipeline: Pipeline, question: Question, answer: Decoded, rows: np.ndarray, scores: np.ndarray, config: RunConfig
) -> dict[str, Any]:
    """One line of the predictions file; rows and scores may hold more passages than were read."""
    prediction, answers, positives = pipeline.prediction(answer.tokens), question.answers, question.positive_ids
    ids, k = pipeline.store.ids_of(rows), config.top_k
    shares = probabilities(scores[:k], config.score_scale)
    ranks = sorted({_RECALL_K, k})
    return {
        "id": question.id,
        "question": question.question,
        "prediction": prediction,
        "log_prob": answer.log_prob,
        "answers": list(answers),
        "em": metrics.exact_match(prediction, answers),
        "f1": metrics.f1(prediction, answers),
        "contains": metrics.contains_answer(prediction, answers),
        **{f"recall_at_{n}": metrics.recall_at_k(ids, positives, n) for n in ranks},
        **{f"hit_at_{n}": metrics.hit_at_k(ids, positives, n) for n in ranks},
        f"mrr_at_{_RANK_K}": metrics.reciprocal_rank(ids, positives, _RANK_K),
        "answer_in_context": metrics.answer_in_context(
            [passage.prompt_text for passage in pipeline.passages(rows[:k])], answers, k
        ),
        "passages": [{"id": passage, "probability": float(share)} for passage, share in zip(ids, shares, strict=False)],
    }


def _add_passage_answers(
    pipeline: Pipeline,
    source: Prepared | CachedGenerations,
    questions: Sequence[str],
    rows: np.ndarray,
    config: RunConfig,
    records: Sequence[dict[str, Any]],
) -> Cost:
    """Puts the greedy answer under each passage into the records of a batch; what that cost."""
    began = time.perf_counter()
    prompts = [
        pipeline.prompts.prompt([passage], question, reserve=config.max_new_tokens)
        for question, found in zip(questions, rows, strict=True)
        for passage in pipeline.passages(found[: config.top_k])
    ]
    greedy = DecodeConfig(max_new_tokens=config.max_new_tokens)
    batch_size = config.eval_batch_size * config.top_k
    count = len(prompts)
    answers = source.decode_answers([[ids] for ids in prompts], np.zeros((count, 1)), greedy, batch_size, [0] * count)
    entries = [entry for record in records for entry in record["passages"]]
    for entry, answer in zip(entries, answers, strict=True):
        entry["answer"] = pipeline.prediction(answer.tokens)
    return _decoding_cost(pipeline, [[ids] for ids in prompts], answers, time.perf_counter() - began)


def _decoding_cost(
    pipeline: Pipeline, prompts: Sequence[Sequence[Sequence[int]]], answers: Sequence[Decoded], seconds: float
) -> Cost:
    """The tokens read behind a question's prompts are taken as shared evenly (attention is a few percent here)."""
    lengths = [len(ids) for group in prompts for ids in group]
    read = [answer.tokens_read // len(group) for group, answer in zip(prompts, answers, strict=True) for _ in group]
    return Cost(seconds, decode_flops(pipeline.generator.size, lengths, read), sum(lengths) + sum(read))


def _cost_file(path: Path) -> Path:
    return path.with_suffix(".cost.json")


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _append_partial(path: Path, identity: Mapping[str, Any], records: Sequence[Mapping[str, Any]], cost: Cost) -> None:
    append_line(_partial(path), json.dumps([identity, records, dataclasses.asdict(cost)]))


def _read_partial(
    path: Path, identity: Mapping[str, Any], batches: Sequence[Sequence[str]]
) -> list[tuple[list[dict[str, Any]], Cost]]:
    """The first of `batches` (question ids) that are done already.

    A last line that a kill has cut off is dropped, and so is what an evaluation of other things or with other batches
    left.
    """

    def parse(line: Any) -> tuple[list[str], list[dict[str, Any]], Cost] | None:
        made_from, records, cost = line
        return ([record["id"] for record in records], records, Cost(**cost)) if made_from == identity else None

    mend = "delete the file, its questions are then answered again"
    lines = read_whole_lines(_partial(path), parse, mend)
    kept, finished = [], []
    for batch, (line, found) in zip(batches, lines, strict=False):
        if found is None or found[0] != batch:
            break
        kept.append(line)
        finished.append(found[1:])
    if _partial(path).exists():
        write_atomic(_partial(path), "".join(kept))
    return finished
