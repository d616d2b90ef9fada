"""A whole run: models and index, the table before, the strategy's phases, the table after, and summary.json.

Every stage leaves its result in the run folder. The same command on an unfinished run continues after the last stage
whose result is there.
"""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ragjax.config import RunConfig
from ragjax.costs import Ledger, peak_memory_bytes
from ragjax.data.batches import round_up
from ragjax.data.dataset import Dataset, load_dataset
from ragjax.data.questions import Question
from ragjax.errors import UserError, reason
from ragjax.evaluation import (
    METRICS,
    Measurement,
    before_after_table,
    check_questions,
    cost_table,
    evaluate,
    paired_interval,
    strategy_table,
    summarise,
)
from ragjax.fields import Checked
from ragjax.generation import check_decoding
from ragjax.parallel import check_same, device_kinds, idle_groups, process_count
from ragjax.pipeline import arrangement_of
from ragjax.reporting import write_run_report
from ragjax.runs import INPUTS, Run, RunFolder, RunRecord, Summary, prepare
from ragjax.training.estimates import MeasuredPhase, strategy_costs
from ragjax.training.loop import PhaseResult, train_phase
from ragjax.training.reuse import adopt, source_run
from ragjax.training.signals import check_prompts, dev_questions, prompt_passages
from ragjax.training.strategies import STRATEGIES, Phase, choose_strategy, needs_generator, phases_of, unread_flags
from ragjax.version import __version__
from ragjax.voice import is_first, say, warn

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "faiss-cpu", "numpy")


def train(config: RunConfig) -> Summary:
    """Runs a configuration to its end and prints the result, or prints that of one that has ended.

    Args:
      config: `run_dir` may be empty for runs/STRATEGY.

    Raises:
      UserError: bad input, or a run folder that belongs to another configuration.
    """
    return train_run(config)[0]


def train_run(config: RunConfig) -> tuple[Summary, Run | None]:
    """`train`, and the run with its models as trained; None where it had ended before, and no model was loaded."""
    summary, run = complete(config)
    files = RunFolder(Path(config.folder))
    _print_summary(files, summary)
    if is_first() and not files.report_file.exists():
        _write_report(files)
    return summary, run


def complete(config: RunConfig, prepared: Run | None = None) -> tuple[Summary, Run | None]:
    """Brings a configuration's run to its end, if it is not there yet: what `train_run` gives, without printing it.

    Args:
      config: as for `train`.
      prepared: a run whose data, untrained models and index are those of the configuration; loaded otherwise.

    Raises:
      UserError: as `train`.
    """
    config = dataclasses.replace(config, run_dir=config.folder)
    strategy, dataset = settle_strategy(config)
    phases = phases_of(dataclasses.replace(config, strategy=strategy))
    check_decoding(config)
    if process_count() > 1:
        arrangement_of(config)  # which refuses what is for one
    files = RunFolder(Path(config.run_dir))
    with files.held():
        files.check_shared()
        check_same("flags", dataclasses.asdict(config))
        check_same(f"files in {files.path}", [files.is_begun, files.is_finished])
        files.check_flags(config)
        if summary := files.read_summary():
            return summary, None
        dataset = prepared.dataset if prepared else dataset or load_dataset(config.data)
        check_splits(config, dataset, phases)
        check_batches(config, phases)
        if prepared:
            run = dataclasses.replace(prepared, config=config, files=files)
            files.check_inputs(run.inputs())
        else:
            warn_of_unread_flags(strategy, [phase for phase in phases if not source_run(config, phase)], config)
            warn_of_repeated_questions(dataset, phases)
            generates = needs_generator(phases, answers=config.decode != "none")

            def check(inputs: Mapping[str, Mapping[str, str]]) -> None:
                files.check_inputs(inputs)
                check_same("models and data", {name: each["sha256"] for name, each in inputs.items()})

            run = prepare(config, dataset, check=check, announced=INPUTS, with_generator=generates)
        check_lengths(run, phases, evaluated_questions(run))
        return run_phases(run, phases)


def settle_strategy(config: RunConfig) -> tuple[str, Dataset | None]:
    """The strategy, and the data where --strategy=auto had to read them; what that picks is printed."""
    if config.strategy != "auto":
        return config.strategy, None
    dataset = load_dataset(config.data)
    strategy, reason = choose_strategy(config, dataset.train)
    say(f"--strategy=auto picks {strategy}: {reason}.", flush=True)
    return strategy, dataset


def measure(run: Run, moment: str) -> Measurement:
    """Evaluates a run's models as they are; the predictions go into its folder under the moment's name."""
    path = run.files.measured(run.config.eval_split, moment)
    return evaluate(run.pipeline, evaluated_questions(run), path, run.config)


def evaluated_questions(run: Run) -> Sequence[Question]:
    """What is asked before and after training."""
    return getattr(run.dataset, run.config.eval_split)[: run.config.eval_limit or None]


def run_phases(run: Run, phases: Sequence[Phase]) -> tuple[Summary, Run]:
    """Before, the phases, after; every result goes into the run's folder, the summary last.

    Args:
      run: as `prepare` gives it.
      phases: those of one of the strategies.

    Returns:
      What was found, and the run with its models as trained.

    Raises:
      UserError: training diverged, or something cannot be written.
    """
    if not run.files.is_begun:
        _begin(run, phases)
    before = measure(run, "before")
    results = _train_phases(run, phases)
    trained = with_phases(run, results)
    after = measure(trained, "after") if phases else before
    summary = Summary(
        strategy=next(name for name, those in STRATEGIES.items() if those == tuple(phases)),
        objective=run.config.objective if any("objective" in phase.flags for phase in phases) else None,
        split=run.config.eval_split,
        n=len(before.records),
        before=summarise(before.records),
        after=summarise(after.records),
        change_95=_changes(before, after),
        cost=_cost(run, trained, before, results, after),
        strategy_costs=_strategy_costs(run, results),
        skipped_questions=_skipped_questions(phases, run.dataset),
        skipped_steps={name: len(result.skipped_steps) for name, result in results.items()},
        step_share={name: result.step_share for name, result in results.items() if result.step_share is not None},
        peak_memory_bytes=peak_memory_bytes(),
        retrieval=_describe_retrieval(run, [before, *results.values(), after]),
        kept={name: None if result.kept is None else result.kept.as_dict() for name, result in results.items()},
    )
    run.files.write_summary(summary)
    steps = [result.step for result in results.values()]
    return summary, dataclasses.replace(trained, step=steps[-1] if steps else 0)


def _begin(run: Run, phases: Sequence[Phase]) -> None:
    """Leaves in the run's folder what it is made from and with."""
    run.files.begin(
        RunRecord(run.config, tuple(phase.name for phase in phases), run.inputs()),
        learning_rates={phase.name: phase.learning_rates(run.config) for phase in phases},
        index=run.pipeline.retriever.index.describe(),
        versions={"ragjax": __version__, **{name: version(name) for name in _PACKAGES}},
        devices=device_kinds(),
    )


def _train_phases(run: Run, phases: Sequence[Phase]) -> dict[str, PhaseResult]:
    """Each phase's result, by its name."""
    results: dict[str, PhaseResult] = {}
    for phase in phases:
        # No phase sees an embedder that another one has tuned: passages come from the untrained one, or from the one
        # that the phase itself moves.
        earlier = {name: result for name, result in results.items() if "embedder" not in result.trained}
        start = with_phases(run, earlier)
        if source_run(run.config, phase):
            results[phase.name] = adopt(start, phase)
        else:
            results[phase.name] = train_phase(start, phase)
            _say_what_is_kept(run.config, phase, results[phase.name])
    return results


def _say_what_is_kept(config: RunConfig, phase: Phase, result: PhaseResult) -> None:
    if result.kept is not None:
        rates = " or ".join(f"--{model}_lr" for model in phase.trains)
        say(result.kept.describe(phase.name, rates))
    elif config.keep == "best":
        say(f"{phase.name}: the last state is kept, because no dev questions tell which is the best.")


def with_phases(run: Run, results: Mapping[str, PhaseResult]) -> Run:
    """The run with what the phases have trained, together."""
    together = {model: trees for result in results.values() for model, trees in result.trained.items()}
    return run.with_trained(run.arrangement.keep(together))


def _cost(
    run: Run, trained: Run, before: Measurement, results: Mapping[str, PhaseResult], after: Measurement
) -> dict[str, Any]:
    """Of the whole run and of each phase."""
    whole = Ledger()
    whole.add("encode", run.pipeline.encode_cost)
    if trained.pipeline.retriever is not run.pipeline.retriever:  # the trained embedder has encoded the passages, too
        whole.add("encode", trained.pipeline.encode_cost)
    whole.add("evaluation", before.cost)
    for result in results.values():
        whole.merge(result.cost)
    if after is not before:
        whole.add("evaluation", after.cost)
    return {**whole.summary(), "phases": {name: result.cost.summary() for name, result in results.items()}}


def _changes(before: Measurement, after: Measurement) -> dict[str, Any]:
    """Each metric's mean change and its 95% interval."""
    return {
        name: paired_interval([line[name] for line in before.records], [line[name] for line in after.records])
        for name in METRICS
    }


def _describe_retrieval(run: Run, parts: Sequence[Measurement | PhaseResult]) -> dict[str, Any]:
    """parts: what has built prompts."""
    pipeline = run.pipeline
    return {
        "index": pipeline.retriever.index.describe(),
        "top_k": run.config.top_k,
        "score_scale": run.config.score_scale,
        "passages_per_second": len(pipeline.store) / pipeline.encode_cost.seconds,
        "passages_cut": len(set().union(*(part.passages_cut for part in parts))),
    }


def _skipped_questions(phases: Sequence[Phase], dataset: Dataset) -> int:
    """Training questions that some phase cannot learn from."""
    return max((sum(not phase.signal.learns_from(q) for q in dataset.train) for phase in phases), default=0)


def _strategy_costs(run: Run, results: Mapping[str, PhaseResult]) -> list[dict[str, Any]]:
    """Every strategy's cost on this data, from what this run has measured."""
    measured = {
        name: MeasuredPhase(result.cost, result.questions) for name, result in results.items() if result.questions
    }
    config = run.config
    prompts = sum(phase.questions for phase in measured.values()) * config.top_k
    read = [phase.cost.part("generator") for phase in measured.values()]
    # Prompts that are drawn for the backward pass are read again there.
    tokens = sum(cost.tokens - (cost.backward_tokens if config.backward_passages else 0) for cost in read)
    questions = run.dataset.train
    labelled = sum(bool(question.positive_ids) for question in questions)
    prompt_length = max(tokens / prompts, 1.0) if prompts else 1.0
    size = run.generator.size if run.pipeline.reader else None
    backward_share = (config.backward_passages or config.top_k) / config.top_k
    costs = strategy_costs(measured, size, prompt_length, len(questions), labelled, backward_share)
    return [dataclasses.asdict(cost) for cost in costs]


def warn_of_unread_flags(strategy: str, phases: Sequence[Phase], *configs: Checked) -> None:
    """Says which flags were given in vain: only phases of other strategies, or one that is taken over, read them."""
    if flags := [flag for config in configs for flag in unread_flags(config, phases)]:
        *first, last = flags
        names, verb, them = (f"{', '.join(first)} and {last}", "change", "them") if first else (last, "changes", "that")
        warn(f"{names} {verb} nothing here: no phase that is trained with --strategy={strategy} reads {them}.")


def warn_of_repeated_questions(dataset: Dataset, phases: Sequence[Phase]) -> None:
    """Says where a split asks what an earlier one has asked: what was trained or chosen on is no fair measure."""
    for split, earlier, repeated in dataset.repeated() if phases else ():
        warn(
            f"{len(repeated):,} of the {len(getattr(dataset, split)):,} {split} questions of {dataset.folder} stand in "
            f'{earlier} too, the first with the id "{repeated[0].id}": their scores will be too good, so remove them '
            "from one of the two."
        )


def check_batches(config: RunConfig, phases: Sequence[Phase]) -> None:
    """Warns where a device has no question in any step, and so computes for nothing.

    Raises:
      UserError: the groups of a mesh are more than the questions of a step.
    """
    groups, accumulation = arrangement_of(config).groups, config.gradient_accumulation
    for phase in phases:
        size, flag = phase.batch_size(config), phase.signal.batch_size_flag
        if config.parallelism == "mesh" and size < groups:
            raise UserError(
                f"--{flag}={size} is less than the {groups} groups of the mesh (data times fsdp), each of which takes "
                f"questions of its own in the phase {phase.name}: give {groups} or more, or a wider tensor axis."
            )
        if idle := idle_groups(size, accumulation, groups):
            what = "devices" if config.parallelism == "pmap" else "groups of devices"
            even = round_up(size, groups * accumulation)
            warn(
                f"--{flag}={size} leaves {idle} of {groups} {what} idle in the phase {phase.name}: {even} would use "
                "them all."
            )


def _print_summary(files: RunFolder, summary: Summary) -> None:
    head = f"{summary.strategy} ({summary.objective})" if summary.objective else summary.strategy
    say(f"\n{head}, {summary.n} {summary.split} questions\n")
    say(before_after_table(summary.before, summary.after, summary.change_95))
    if skipped := summary.skipped_questions:
        say(f"\nskipped by the embedder's training: {skipped} questions without positive_ids")
    for phase, steps in summary.skipped_steps.items():
        if steps:
            say(f"\nskipped in the phase {phase}: {steps} steps whose loss or gradient was not finite")
    say(f"\n{cost_table(summary.cost)}")
    for phase, share in summary.step_share.items():
        say(f"inside compiled steps: {share:.1%} of the phase {phase}, measurements on the dev questions apart")
    say("\nOne epoch of each strategy on these questions, by what this run has measured:\n")
    say(f"{strategy_table(summary.strategy_costs)}\n")
    run_dir = f"--run_dir={shlex.quote(str(files.path))}"
    say("Next:")
    if "generator" in files.record().inputs:
        say(f'  python -m ragjax.ask {run_dir} "your question"')
    say(f"  python -m ragjax.evaluate {run_dir} --split={summary.split}")
    say(f"  python -m ragjax.export {run_dir} --out=exported")
    # tensorboardX writes what this package, which nothing here needs, shows.
    install = "" if find_spec("tensorboard") else "pip install tensorboard && "
    say(f"  {install}python -m tensorboard.main --logdir={shlex.quote(str(files.events_folder))}")


def _write_report(files: RunFolder) -> None:
    """The run as a page. It is finished already, so nothing that goes wrong here may end it with an error."""
    try:
        say(f"\nreport: {write_run_report(files)}")
    except Exception as error:  # what drawing raises has no kind in common
        warn(f"{files.report_file} was not written ({reason(error)}): the same command tries again.")


def check_splits(config: RunConfig, dataset: Dataset, phases: Sequence[Phase]) -> None:
    """Raises UserError where a split that is needed has no questions, or one of its questions no answer."""
    for split, needed in ((config.eval_split, True), ("train", bool(phases))):
        if needed and not getattr(dataset, split):
            raise UserError(f"{dataset.folder} has no {split} questions: add {dataset.split_file(split)} to it.")
    check_training_answers(config, dataset, phases)
    if config.decode != "none":
        asked = getattr(dataset, config.eval_split)[: config.eval_limit or None]
        dataset.check_answers(config.eval_split, asked, f"--decode={config.decode}")


def check_training_answers(config: RunConfig, dataset: Dataset, phases: Sequence[Phase]) -> None:
    """Raises UserError, naming it, where a question that a phase needs answers of has none."""
    for phase in phases:
        if phase.signal.reads_answers:
            for split, questions in (("train", dataset.train), ("dev", dev_questions(config, dataset))):
                dataset.check_answers(split, questions, f"the phase {phase.name}")


def check_lengths(run: Run, phases: Sequence[Phase], asked: Sequence[Question]) -> None:
    """Raises UserError, naming it, where a question that will be used is too long for the generator.

    asked: questions to be answered, besides those that the phases learn from and are measured on.
    """
    config = run.config
    if any(phase.signal.reads_answers for phase in phases):
        for questions in (run.dataset.train, dev_questions(config, run.dataset)):
            check_prompts(run.pipeline, questions, prompt_passages(config))
    check_questions(run.pipeline, asked, config)
