"""Evaluation of finished, unfinished or untrained models on any questions, with several decoders in one go."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ragjax.config import DecodeConfig, EvaluateConfig, RetrievalConfig, RunConfig
from ragjax.costs import Cost
from ragjax.data.dataset import load_dataset
from ragjax.data.questions import Question, check_answers, read_questions
from ragjax.errors import UserError
from ragjax.evaluation.predictions import check_questions, evaluate, holds
from ragjax.evaluation.report import METRICS, RANKS, evaluation_table, pairs_table, retrieval_table
from ragjax.evaluation.statistics import Interval, mean_interval, paired_interval, paired_p_value
from ragjax.files import write_json
from ragjax.generation import check_decoding
from ragjax.parallel import refuse_several_processes
from ragjax.runs import Run, RunFolder, open_run, prepare
from ragjax.voice import say

_DEFAULT_RUN = "runs/joint"
_PLAIN_RUN = "runs/plain"


@dataclasses.dataclass(frozen=True)
class Result:
    """The predictions of one decoder that reads one number of passages, and what they score."""

    decode: str  # the decoder, and what tells it from others of its kind, as in tables and file names
    top_k: int
    path: Path  # the file of predictions
    predictions: Sequence[Mapping[str, Any]]  # its lines, one a question, in the questions' order
    scores: Mapping[str, Interval | None]  # by metric: (mean, low, high), fractions; None where no question has it
    cost: Cost
    passages_cut: int

    def as_json(self) -> dict[str, Any]:
        return {
            "decode": self.decode,
            "top_k": self.top_k,
            "predictions": str(self.path),
            "scores": self.scores,
            "cost": dataclasses.asdict(self.cost),
            "passages_cut": self.passages_cut,
        }


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate_runs` finds."""

    path: Path  # the .evaluation.json that holds it, the predictions apart
    questions: str  # what they are called
    n: int  # questions
    run: Run
    results: Sequence[Result]  # by decoder, and of each by number of passages
    paired_with: Run | None = None
    # Each metric's difference to the second run: {"decode", "top_k", "metric", "first", "second", "difference": (mean,
    # low, high), "p_value"}
    pairs: Sequence[Mapping[str, Any]] = ()

    def as_json(self) -> dict[str, Any]:
        content = {"questions": self.questions, "n": self.n, "run": str(self.run.folder), "step": self.run.step}
        content["index"] = self.run.pipeline.retriever.index.describe()
        content["results"] = [result.as_json() for result in self.results]
        if self.paired_with:
            content["pairs"] = self.pairs
            content["paired_with"] = {"run": str(self.paired_with.folder), "step": self.paired_with.step}
        return content


def evaluate_runs(config: EvaluateConfig, overrides: Mapping[str, Any], run: Run | None = None) -> Evaluation:
    """Evaluates what `config` names with each of its decoders and numbers of passages, and writes what it finds.

    Args:
      config: what is evaluated, on which questions.
      overrides: fields of DecodeConfig and RetrievalConfig that differ from the run's; both runs search by the latter.
      run: the run that `config` names, where it is open already.

    Raises:
      UserError: no such run, models, split or decoder; settings that contradict each other; runs over other
        passages; a predictions file of something else; one of several processes.
    """
    refuse_several_processes()
    search = {f.name: overrides[f.name] for f in dataclasses.fields(RetrievalConfig) if f.name in overrides}
    run = _open(config, run, search)
    other = None
    if config.paired_with:  # answers as the first one does, whatever its own way is
        other = _opened(config.paired_with, _decodes(config, run.config), _moved_data(config, run), search)
    if other and other.pipeline.store.content_hash != run.pipeline.store.content_hash:
        raise UserError(
            f"--paired_with={config.paired_with} retrieves from other passages than {run.folder}, so their scores "
            "cannot be paired: choose two runs on the same corpus."
        )
    settings = _settings(config, run, overrides)
    label, questions = _questions(config, run)
    for each in settings:
        if each.decode != "none":
            path = config.questions or run.dataset.files.get(config.split, run.dataset.folder)
            check_answers(questions, path, f"--decode={each.decode}")
        check_questions(run.pipeline, questions, each)
    results = _evaluated(config, run, settings, questions, label, _folder(config, run))
    path = _folder(config, run) / f"{label}.evaluation.json"
    evaluation = Evaluation(path, label, len(questions), run, results)
    if other:
        folder = Path(config.out) / "paired" if config.out else other.files.predictions_folder
        second = _evaluated(config, other, _alike(settings, other.config), questions, label, folder)
        evaluation = dataclasses.replace(evaluation, paired_with=other, pairs=_pairs(results, second))
    write_json(path, evaluation.as_json())
    return evaluation


def _open(config: EvaluateConfig, run: Run | None, search: Mapping[str, Any]) -> Run:
    """The run, or untrained models as one, with these fields of RetrievalConfig."""
    if not (config.embedder or config.generator):
        if run is None or any(getattr(run.config, name) != value for name, value in search.items()):
            folder = config.run_dir or _DEFAULT_RUN
            recorded = RunFolder(Path(folder)).record().config
            return _opened(folder, _decodes(config, recorded), config.data, search)
        if config.data:
            run.files.check_inputs({"data": {"sha256": load_dataset(config.data).sha256}})
        return run
    if config.run_dir:
        raise UserError("--run_dir already names the models: leave it out, or --embedder and --generator.")
    given = {name: value for name in ("embedder", "generator", "data") if (value := getattr(config, name))}
    if config.top_k:
        given["top_k"] = config.top_k[0]
    plain = RunConfig(strategy="none", lora_rank=0, run_dir=_PLAIN_RUN, **given, **search)
    return prepare(plain, with_generator=_decodes(config, plain))


def _decodes(config: EvaluateConfig, run_config: RunConfig) -> bool:
    """Whether any answer is asked for."""
    return set(config.decode or [run_config.decode]) != {"none"}


def _moved_data(config: EvaluateConfig, first: Run) -> str:
    """Where the second run's data are now: with the first one's, if they are the same; "" where it found them."""
    recorded = RunFolder(Path(config.paired_with)).record().inputs["data"]["sha256"]
    return config.data if recorded == first.dataset.sha256 else ""


def _opened(folder: str, with_generator: bool, data: str, search: Mapping[str, Any]) -> Run:
    run = open_run(folder, with_generator, data, search)
    if sentence := run.unfinished():
        say(sentence, flush=True)
    return run


def _folder(config: EvaluateConfig, run: Run) -> Path:
    return Path(config.out) if config.out else run.files.predictions_folder


def _settings(config: EvaluateConfig, run: Run, overrides: Mapping[str, Any]) -> list[RunConfig]:
    """The run's configuration under each decoder and number of passages."""
    settings = [
        dataclasses.replace(run.config, **overrides, decode=name, top_k=k, eval_batch_size=config.eval_batch_size)
        for name in config.decode or [run.config.decode]
        for k in config.top_k or [run.config.top_k]
    ]
    for each in settings:
        if each.decode == "none" and config.passage_answers:
            raise UserError("--passage_answers asks for answers, and --decode=none gives none: leave one of them out.")
        if each.decode != "none" and run.pipeline.reader is None:
            raise UserError(f"{run.folder} was opened without its generator, which --decode={each.decode} needs.")
        check_decoding(each)
        run.pipeline.check_top_k(each.top_k)
    return settings


def _alike(settings: Sequence[RunConfig], other: RunConfig) -> list[RunConfig]:
    """The second run's configuration, read and decoded as the first one's."""
    names = [field.name for field in dataclasses.fields(DecodeConfig)] + ["top_k", "eval_batch_size"]
    return [dataclasses.replace(other, **{name: getattr(each, name) for name in names}) for each in settings]


def _questions(config: EvaluateConfig, run: Run) -> tuple[str, Sequence[Question]]:
    """(what they are called, the questions)."""
    if config.questions:
        source, label = config.questions, Path(config.questions).name.split(".")[0]
        questions = read_questions(source, {passage.id for passage in run.pipeline.store})
    else:
        source, label = f"{run.dataset.folder}'s {config.split} split", config.split
        questions = getattr(run.dataset, config.split)
    if not questions:
        raise UserError(f"{source} has no questions: choose another --split, or give --questions a file.")
    if config.eval_limit and config.eval_limit < len(questions):
        return f"{label}.first{config.eval_limit}", questions[: config.eval_limit]
    return label, questions


def _evaluated(
    config: EvaluateConfig,
    run: Run,
    settings: Sequence[RunConfig],
    questions: Sequence[Question],
    label: str,
    folder: Path,
) -> list[Result]:
    results = []
    for each in settings:
        # What training has decoded at its end need not be decoded again.
        path = run.files.measured(config.split, "after")
        if not holds(path, run.pipeline, questions, each, config.passage_answers):
            path = folder / f"{_name(label, each, config.passage_answers)}.jsonl"
        measured = evaluate(run.pipeline, questions, path, each, passage_answers=config.passage_answers)
        names = dict.fromkeys(
            (*METRICS, *(f"{metric}_at_{n}" for metric in ("recall", "hit") for n in (*RANKS, each.top_k)))
        )
        values = {
            name: [record[name] for record in measured.records] for name in (*names, "mrr_at_10", "answer_in_context")
        }
        results.append(
            Result(
                decode=_decoder(each),
                top_k=each.top_k,
                path=path,
                predictions=measured.records,
                scores={
                    name: mean_interval([value for value in column if value is not None])
                    for name, column in values.items()
                },
                cost=measured.cost,
                passages_cut=len(measured.passages_cut),
            )
        )
    return results


def _decoder(config: RunConfig) -> str:
    """What tells one way of decoding from another, as it stands in tables and file names."""
    parts = [config.decode]
    if config.decode == "rag_sequence":
        parts.append(config.decode_variant)
    if config.num_beams > 1:
        parts.append(f"beams{config.num_beams}")
    if config.temperature > 0:
        parts.append(f"t{config.temperature:g}-p{config.top_p:g}-seed{config.sample_seed}")
    return "-".join(parts)


def _name(label: str, config: RunConfig, passage_answers: bool) -> str:
    ending = ".each" if passage_answers else ""
    return f"{label}.{_decoder(config)}.k{config.top_k}{_search(config)}{ending}"


def _search(config: RunConfig) -> str:
    """What tells one way of finding passages from the plain one, as it stands in file names."""
    parts = [config.retriever] if config.retriever != "dense" else []
    if config.index_dir:
        parts.append(Path(config.index_dir).name + (f"-nprobe{config.nprobe}" if config.nprobe else ""))
    if config.hops > 1:
        parts.append(f"hops{config.hops}")
    if config.rerank:
        parts.append(f"{Path(config.rerank).name}{config.rerank_top}")
    if config.search_on == "device":
        parts.append(f"device-{config.device_dtype}{'' if config.device_recall == 1 else f'-{config.device_recall:g}'}")
    return "".join(f".{part}" for part in parts)


def _pairs(first: Sequence[Result], second: Sequence[Result]) -> list[dict[str, Any]]:
    """Each metric's difference, second - first, under the same decoder and number of passages."""
    pairs = []
    for one, other in zip(first, second, strict=True):
        for metric in one.scores:
            before, after = ([record[metric] for record in side.predictions] for side in (one, other))
            first_score, second_score = one.scores[metric], other.scores[metric]
            difference = paired_interval(before, after)
            if difference is None or first_score is None or second_score is None:
                continue
            pairs.append(
                {
                    "decode": one.decode,
                    "top_k": one.top_k,
                    "metric": metric,
                    "first": first_score[0],
                    "second": second_score[0],
                    "difference": difference,
                    "p_value": paired_p_value(before, after),
                }
            )
    return pairs


def print_evaluation(evaluation: Evaluation) -> None:
    """The scores, the comparison with a second run, and what each file of predictions has cost."""
    result = evaluation.as_json()
    say(f"\n{result['run']} at step {result['step']}, {result['n']} questions ({result['questions']})\n")
    answered = [each for each in result["results"] if each["decode"] != "none"]
    if answered:
        say(evaluation_table(answered))
    if len(answered) < len(result["results"]):
        say(retrieval_table(result["results"][0]["scores"]))
    if "pairs" in result:
        say(f"\ncompared with {result['paired_with']['run']} at step {result['paired_with']['step']}\n")
        say(pairs_table(result["pairs"]))
    for each in result["results"]:
        cost, cut = each["cost"], each["passages_cut"]
        note = f", {cut} passages cut" if cut else ""
        say(
            f"\n{each['predictions']}: {cost['seconds']:,.1f} s, {cost['tokens']:,} tokens, "
            f"{cost['flops'] / 1e12:,.2f} TFLOPs{note}"
        )
    say(f"\n{evaluation.path}")
