"""Evaluation: retrieve, decode, score, and write one line a question."""

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ragjax import metrics
from ragjax.config import DecodeConfig, RetrievalConfig, RunConfig
from ragjax.costs import Cost, decode_flops, forward_flops
from ragjax.data.passages import PassageStore
from ragjax.data.prompts import Prompt
from ragjax.data.questions import Question
from ragjax.errors import UserError
from ragjax.evaluation.generations import CachedGenerations
from ragjax.evaluation.report import METRICS, RANKS
from ragjax.files import append_line, read_json, read_json_lines, read_whole_lines, remove, write_atomic, write_json
from ragjax.generation import Decoded, Prepared, question_seeds
from ragjax.parallel import check_same
from ragjax.pipeline import Pipeline, arrangement_of, probabilities
from ragjax.retrieval import Retrieval, read_index_record
from ragjax.voice import progress

# Of a mean over a search's questions, and of the reciprocal rank.
_RECALL_K = 5
_RANK_K = 10
# What else of the configuration makes a prompt and weighs its passages.
_READ_AS = ("top_k", "score_scale", "prompt", "max_passage_tokens")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What an evaluation finds."""

    records: Sequence[Mapping[str, Any]]  # one a question, in the questions' order
    cost: Cost
    passages_cut: frozenset[str]  # ids of the passages that some prompt holds shortened


def evaluate(
    pipeline: Pipeline,
    questions: Sequence[Question],
    path: Path,
    config: RunConfig,
    *,
    generations: CachedGenerations | None = None,
    passage_answers: bool = False,
) -> Measurement:
    """Predictions for `questions` and what they cost, both of which are also written beside `path`.

    A finished file is read back. Finished batches are kept in `<path>.partial`, so an evaluation that was killed
    continues after them: on as many devices, batches are the same ones.

    Args:
      pipeline: the models to evaluate.
      questions: what is asked.
      path: the predictions file (.jsonl); a line is {id, question, prediction, log_prob, answers, em, f1, contains,
        recall_at_N, hit_at_N, mrr_at_10, answer_in_context, passages: [{id, probability}]}, N being each of RANKS and
        top_k. answer_in_context is at top_k: of what the generator could read. What needs an answer is None with
        --decode=none, what needs accepted answers is None where a question has none.
      config: top_k, score_scale, eval_batch_size, and how answers are decoded.
      generations: answers of this pipeline's generator that may be there already.
      passage_answers: also the greedy answer under each passage by itself, as "answer" of its entry in passages.

    Raises:
      UserError: the file holds other predictions, cannot be written, or a question does not fit the window.
    """
    identity = _identity(pipeline, questions, config, passage_answers)
    if path.exists():
        return _read_finished(path, identity)
    check_questions(pipeline, questions, config)
    arrangement = arrangement_of(config)
    plan = _plan(pipeline, questions, config, passage_answers, config.eval_batch_size * arrangement.copies)
    # An empty cache of generations is false, too.
    source: Prepared | CachedGenerations | None = generations
    if generations is None and config.decode != "none":
        source = pipeline.generator.prepared(arrangement)
    finished = _read_partial(path, identity, [[questions[i].id for i in batch] for batch in plan.batches])
    check_same(f"finished answers of {path}", len(finished))  # before the first writes more
    records: dict[int, dict[str, Any]] = {}
    cost = plan.cost
    for number, batch in enumerate(progress(plan.batches, desc=f"answering ({path.stem})", unit="batch")):
        if number < len(finished):
            found, spent = finished[number]
        else:
            found, spent = _answer(pipeline, source, plan, batch, config)
            _append_partial(path, identity, found, spent)
        records.update(zip(batch, found, strict=True))
        cost += spent
    measured = Measurement([records[i] for i in range(len(questions))], cost, plan.passages_cut)
    _write(path, identity, measured)
    return measured


def check_questions(pipeline: Pipeline, questions: Sequence[Question], config: RunConfig) -> None:
    """Raises UserError, naming it, where a question and its answer are too long for the generator's window."""
    if config.decode != "none":
        passages = config.top_k if config.decode == "concat" else 1
        for question in questions:
            pipeline.check_room(question, passages, config.max_new_tokens)


def _read_finished(path: Path, identity: Mapping[str, Any]) -> Measurement:
    """What the file holds. Raises UserError where that is something else."""
    spent = read_json(_cost_file(path))
    if spent.pop("made_from", None) != identity:
        raise UserError(
            f"{path} holds predictions of other models, questions or settings: move it away or write elsewhere."
        )
    return Measurement(read_json_lines(path), passages_cut=frozenset(spent.pop("passages_cut")), cost=Cost(**spent))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What will be decoded: n questions, their passages and prompts, and the batches that they are decoded in."""

    questions: Sequence[Question]
    found: Mapping[int, Retrieval]  # for each number of passages: retrieval is also scored at others than what is read
    prompts: Sequence[Sequence[Prompt]]  # [n][1 or top_k]
    log_weights: Sequence[np.ndarray]  # [n] of [1 or top_k]
    alone: Sequence[Sequence[Prompt]]  # [n][top_k], a passage each; [n][0] where they are not asked for
    batches: Sequence[Sequence[int]]  # places in `questions`
    cost: Cost  # of the retrieval

    @property
    def passages_cut(self) -> frozenset[str]:
        groups = itertools.chain(self.prompts, self.alone)
        return frozenset().union(*(prompt.cut for prompt in itertools.chain.from_iterable(groups)))


def _plan(
    pipeline: Pipeline, questions: Sequence[Question], config: RunConfig, passage_answers: bool, size: int
) -> _Plan:
    """Retrieves for all questions, builds their prompts and forms batches of so many."""
    began = time.perf_counter()
    texts = [question.question for question in questions]
    found = pipeline.retrieve_each(texts, [_within(pipeline, k) for k in _ranks(config)])
    read = found[config.top_k].passage_rows
    asked: list[tuple[list[Prompt], np.ndarray]] = [([], np.empty(0)) for _ in questions]
    if config.decode != "none":
        asked = [
            pipeline.decoding_prompts(*each, config)
            for each in zip(texts, read, found[config.top_k].scores, strict=True)
        ]
    alone = [
        [pipeline.prompts.prompt([passage], text, config.max_new_tokens) for passage in pipeline.passages(passage_rows)]
        for text, passage_rows in zip(texts, read if passage_answers else read[:, :0], strict=True)
    ]
    lengths = list(map(len, pipeline.embedder.query_tokens(texts)))
    flops = forward_flops(pipeline.embedder.size, lengths, 0)
    cost = Cost(time.perf_counter() - began, flops, sum(lengths))
    # Prompts of like length share a batch, so that little of it is padding.
    longest = [max((len(prompt.ids) for prompt in prompts), default=0) for prompts, _ in asked]
    order = sorted(range(len(questions)), key=lambda i: (longest[i], i))
    return _Plan(
        questions,
        found,
        [prompts for prompts, _ in asked],
        [log_weights for _, log_weights in asked],
        alone,
        [order[start : start + size] for start in range(0, len(order), size)],
        cost,
    )


def _answer(
    pipeline: Pipeline,
    source: Prepared | CachedGenerations | None,
    plan: _Plan,
    batch: Sequence[int],
    config: RunConfig,
) -> tuple[list[dict[str, Any]], Cost]:
    """The records of a batch, and what decoding them has cost."""
    began = time.perf_counter()
    if source is None:
        return [_record(pipeline, plan, i, None, config) for i in batch], Cost()
    prompts = [[prompt.ids for prompt in plan.prompts[i]] for i in batch]
    log_weights = np.stack([plan.log_weights[i] for i in batch])
    seeds = question_seeds(config, batch)
    answers = source.decode_answers(prompts, log_weights, config, config.eval_batch_size, seeds)
    cost = _decoding_cost(pipeline, prompts, answers, time.perf_counter() - began)
    records = [_record(pipeline, plan, i, answer, config) for i, answer in zip(batch, answers, strict=True)]
    if alone := [prompt for i in batch for prompt in plan.alone[i]]:
        cost += _add_passage_answers(pipeline, source, alone, config, records)
    return records, cost


def _write(path: Path, identity: Mapping[str, Any], measured: Measurement) -> None:
    """The predictions and, first, what they cost; then the finished batches are no longer needed."""
    cut = sorted(measured.passages_cut)
    write_json(_cost_file(path), {**dataclasses.asdict(measured.cost), "passages_cut": cut, "made_from": identity})
    write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in measured.records))
    remove(_partial(path))


def copy_predictions(source: Path, target: Path) -> None:
    """The finished predictions at `source` with their cost, as if they had been made at `target`, too.

    Raises:
      UserError: they cannot be read or written.
    """
    write_json(_cost_file(target), read_json(_cost_file(source)))
    write_atomic(target, source.read_text(encoding="utf-8"))


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
    # Files of runs that know none of these flags say nothing of them.
    searched = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(RetrievalConfig)
        if getattr(config, field.name) != field.default
    }
    if pipeline.is_encoded_anew:  # the same weights, over the vectors of the untrained ones, answer otherwise
        searched["is_encoded_anew"] = True
    if config.index_dir:  # which may move
        searched["index_dir"] = read_index_record(Path(config.index_dir)).sha256
    return {
        **{name: getattr(config, name) for name in (*fields, *_READ_AS)},
        **searched,
        "passage_answers": passage_answers,
        "questions": hashlib.sha256(asked.encode()).hexdigest(),
        "corpus": pipeline.store.content_hash,
        "embedder": pipeline.embedder.key,
        "generator": None if config.decode == "none" else pipeline.generator.key,
    }


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Mean of each metric over the questions that have it; None where none has."""
    return {name: metrics.mean_of_defined(record[name] for record in records) for name in METRICS}


def mean_recall(store: PassageStore, questions: Sequence[Question], passage_rows: np.ndarray) -> float | None:
    """Recall@5 of what was found, passage_rows [n, k >= 5] best first; None where no question has labelled passages."""
    return metrics.mean_of_defined(
        metrics.recall_at_k(store.ids_of(found), question.positive_ids, _RECALL_K)
        for question, found in zip(questions, passage_rows, strict=True)
    )


def _record(pipeline: Pipeline, plan: _Plan, i: int, answer: Decoded | None, config: RunConfig) -> dict[str, Any]:
    """The line of the i-th question in the predictions file; each rank is scored by what is found for so many."""
    question, k = plan.questions[i], config.top_k
    positives, ranks = question.positive_ids, _ranks(config)
    ids = {n: pipeline.store.ids_of(plan.found[_within(pipeline, n)].passage_rows[i]) for n in ranks}
    shares = probabilities(plan.found[k].scores[i], config.score_scale)
    texts = [passage.prompt_text for passage in pipeline.passages(plan.found[k].passage_rows[i])]
    return {
        "id": question.id,
        "question": question.question,
        **_answer_fields(None if answer is None else pipeline.prediction(answer.tokens), answer, question.answers),
        **{f"recall_at_{n}": metrics.recall_at_k(ids[n], positives, n) for n in ranks},
        **{f"hit_at_{n}": metrics.hit_at_k(ids[n], positives, n) for n in ranks},
        f"mrr_at_{_RANK_K}": metrics.reciprocal_rank(ids[_RANK_K], positives, _RANK_K),
        "answer_in_context": metrics.answer_in_context(texts, question.answers, k) if question.answers else None,
        "passages": [
            {"id": passage, "probability": float(share)} for passage, share in zip(ids[k], shares, strict=True)
        ],
    }


def _ranks(config: RunConfig) -> list[int]:
    """At which retrieval is scored."""
    return sorted({*RANKS, config.top_k})


def _within(pipeline: Pipeline, k: int) -> int:
    return min(k, len(pipeline.store))


def _answer_fields(prediction: str | None, answer: Decoded | None, accepted: Sequence[str]) -> dict[str, Any]:
    """What a line says of the answer; None where there is none."""
    scores = {"em": metrics.exact_match, "f1": metrics.f1, "contains": metrics.contains_answer}
    return {
        "prediction": prediction,
        "log_prob": None if answer is None else answer.log_prob,
        "answers": list(accepted),
        **{
            name: None if prediction is None or not accepted else score(prediction, accepted)
            for name, score in scores.items()
        },
    }


def _add_passage_answers(
    pipeline: Pipeline,
    source: Prepared | CachedGenerations,
    alone: Sequence[Prompt],
    config: RunConfig,
    records: Sequence[dict[str, Any]],
) -> Cost:
    """Puts the greedy answer under each passage into the records of a batch; what that cost."""
    began = time.perf_counter()
    prompts = [[prompt.ids] for prompt in alone]
    greedy = DecodeConfig(max_new_tokens=config.max_new_tokens)
    batch_size = config.eval_batch_size * config.top_k
    count = len(prompts)
    answers = source.decode_answers(prompts, np.zeros((count, 1)), greedy, batch_size, [0] * count)
    entries = [entry for record in records for entry in record["passages"]]
    for entry, answer in zip(entries, answers, strict=True):
        entry["answer"] = pipeline.prediction(answer.tokens)
    return _decoding_cost(pipeline, prompts, answers, time.perf_counter() - began)


def _decoding_cost(
    pipeline: Pipeline, prompts: Sequence[Sequence[Sequence[int]]], answers: Sequence[Decoded], seconds: float
) -> Cost:
    """The tokens read after a question's prompts are taken as shared evenly (attention is a few percent here)."""
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

    mend = "delete it, and its questions will be answered again"
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
