"""A whole run: models and index, the table before, the strategy's phases, the table after, and summary.json.

Every stage leaves its result in the run folder, and the same command on an unfinished run goes on behind the last
one that is there.
"""

import contextlib
import dataclasses
import fcntl
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ragjax.config import RunConfig
from ragjax.costs import Ledger, peak_memory_bytes
from ragjax.data.sources import Dataset, load_dataset
from ragjax.errors import UserError
from ragjax.evaluation import (
    METRICS,
    before_after_table,
    cost_table,
    evaluate,
    paired_interval,
    strategy_table,
    summarise,
)
from ragjax.files import read_json, write_json
from ragjax.generation import check_decoding
from ragjax.pipeline import (
    CONFIG_FILE,
    SUMMARY_FILE,
    Pipeline,
    build_pipeline,
    check_unchanged,
    describe_inputs,
    load_models,
)
from ragjax.training.estimates import MeasuredPhase, strategy_costs
from ragjax.training.loop import PhaseResult, train_phase
from ragjax.training.reuse import adopt, source_run
from ragjax.training.strategies import Phase, choose_strategy, phases_of
from ragjax.version import __version__

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "faiss-cpu", "numpy")


def run(config: RunConfig) -> dict[str, Any]:
    """Runs a configuration to its end, or prints the result of one that has ended.

    Args:
      config: `run_dir` may be empty for runs/STRATEGY.

    Returns:
      What summary.json holds.

    Raises:
      UserError: bad input, or a run folder that belongs to another configuration.
    """
    config = dataclasses.replace(config, run_dir=config.run_dir or f"runs/{config.strategy}")
    folder = Path(config.run_dir)
    dataset, strategy = None, config.strategy
    if strategy == "auto":
        dataset = load_dataset(config.data)
        strategy, reason = choose_strategy(config, dataset.train)
        print(f"--strategy=auto picks {strategy}: {reason}.", flush=True)
    phases = phases_of(dataclasses.replace(config, strategy=strategy))
    check_decoding(config)
    with only_process(folder):
        record = _check_flags(config, folder)
        if (folder / SUMMARY_FILE).is_file():
            summary = read_json(folder / SUMMARY_FILE)
        else:
            dataset = dataset or load_dataset(config.data)
            _check_splits(config, dataset, phases)
            pipeline = _prepare(config, folder, phases, dataset, record)
            summary = _run_stages(config, strategy, folder, phases, dataset, pipeline)
        _print_summary(folder, summary)
        return summary


def _prepare(
    config: RunConfig, folder: Path, phases: Sequence[Phase], dataset: Dataset, record: Mapping[str, Any] | None
) -> Pipeline:
    """Models, index and config.json."""
    embedder, generator = load_models(config)
    for role, model in (("embedder", embedder), ("generator", generator)):
        print(f"{role}: {model.describe()}", flush=True)
    counts = f"{len(dataset.train)} / {len(dataset.dev)} / {len(dataset.test)} questions"
    print(f"data: {dataset.name}, {len(dataset.passages)} passages, {counts}, sha256 {dataset.sha256[:12]}", flush=True)
    if record is not None:
        check_unchanged(record, folder, dataset, embedder, generator)
    pipeline = build_pipeline(config, dataset, embedder, generator)
    if record is None:
        content = {
            "flags": dataclasses.asdict(config),
            "phases": [phase.name for phase in phases],
            "learning_rates": {phase.name: phase.learning_rates(config) for phase in phases},
            "inputs": describe_inputs(dataset, embedder, generator),
            "index": pipeline.index.describe(),
            "versions": {"ragjax": __version__, **{name: version(name) for name in _PACKAGES}},
            "devices": [str(device.device_kind) for device in jax.local_devices()],
        }
        write_json(folder / CONFIG_FILE, content)
    return pipeline


def _run_stages(
    config: RunConfig, strategy: str, folder: Path, phases: Sequence[Phase], dataset: Dataset, pipeline: Pipeline
) -> dict[str, Any]:
    """Before, phases, after; writes and returns the summary."""
    questions = getattr(dataset, config.eval_split)[: config.eval_limit or None]
    cost = Ledger()
    cost.add("encode", pipeline.encode_cost)

    def measure(moment: str, pipeline: Pipeline) -> list[dict[str, Any]]:
        path = folder / "predictions" / f"{config.eval_split}.{moment}.jsonl"
        records, spent = evaluate(pipeline, questions, path, config)
        cost.add("evaluation", spent)
        return records

    before = measure("before", pipeline)
    results = _train(config, folder, phases, dataset, pipeline)
    for result in results.values():
        cost.merge(result.cost)
    trained = pipeline.with_trained(on_device(results))
    after = measure("after", trained) if phases else before
    summary = {
        "strategy": strategy,
        "objective": config.objective,
        **_scores(config, before, after),
        "cost": {**cost.summary(), "phases": {name: result.cost.summary() for name, result in results.items()}},
        "strategy_costs": _strategy_costs(config, results, dataset, pipeline),
        "skipped_questions": _skipped_questions(phases, dataset),
        "peak_memory_bytes": peak_memory_bytes(),
        "retrieval": {
            "index": pipeline.index.describe(),
            "top_k": config.top_k,
            "score_scale": config.score_scale,
            "passages_per_second": len(pipeline.store) / pipeline.encode_cost.seconds,
            "passages_cut": len(pipeline.prompts.passages_cut),
        },
    }
    write_json(folder / SUMMARY_FILE, summary)
    return summary


def _train(
    config: RunConfig, folder: Path, phases: Sequence[Phase], dataset: Dataset, pipeline: Pipeline
) -> dict[str, PhaseResult]:
    """Each phase's result, by its name."""
    results: dict[str, PhaseResult] = {}
    for phase in phases:
        # No phase sees an embedder that another one has tuned: passages come from the untrained one, or from the one
        # that the phase itself moves.
        earlier = {name: result for name, result in results.items() if "embedder" not in result.trained}
        start = pipeline.with_trained(on_device(earlier))
        if source_run(config, phase):
            results[phase.name] = adopt(config, phase, start, folder)
        else:
            results[phase.name] = train_phase(config, phase, start, dataset, folder)
    return results


def on_device(results: Mapping[str, PhaseResult]) -> dict[str, Any]:
    """What the phases trained, together."""
    together = {model: trees for result in results.values() for model, trees in result.trained.items()}
    return jax.tree.map(jnp.asarray, together)


def _scores(
    config: RunConfig, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    pairs = {name: ([line[name] for line in before], [line[name] for line in after]) for name in METRICS}
    return {
        "split": config.eval_split,
        "n": len(before),
        "before": summarise(before),
        "after": summarise(after),
        "change_95": {name: paired_interval(*values) for name, values in pairs.items()},
    }


def _skipped_questions(phases: Sequence[Phase], dataset: Dataset) -> int:
    """Training questions without labels, where a phase learns from labels."""
    if not any(phase.signal == "positives" for phase in phases):
        return 0
    return sum(not question.positive_ids for question in dataset.train)


def _strategy_costs(
    config: RunConfig, results: Mapping[str, PhaseResult], dataset: Dataset, pipeline: Pipeline
) -> list[dict[str, Any]]:
    """Every strategy's cost on this data, from what this run has measured."""
    measured = {
        name: MeasuredPhase(result.cost, result.questions) for name, result in results.items() if result.questions
    }
    rows = sum(phase.questions for phase in measured.values()) * config.top_k
    tokens = sum(phase.cost.part("generator").tokens for phase in measured.values())
    labelled = sum(bool(question.positive_ids) for question in dataset.train)
    size = pipeline.generator.size
    costs = strategy_costs(measured, size, max(tokens / rows, 1.0) if rows else 1.0, len(dataset.train), labelled)
    return [dataclasses.asdict(cost) for cost in costs]


def _print_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    print(f"\n{summary['strategy']} ({summary['objective']}), {summary['n']} {summary['split']} questions\n")
    print(before_after_table(summary["before"], summary["after"], summary["change_95"]))
    if skipped := summary["skipped_questions"]:
        print(f"\nskipped by the embedder's training: {skipped} questions without positive_ids")
    print(f"\n{cost_table(summary['cost'])}")
    print("\nOne epoch of each strategy on these questions, by what this run has measured:\n")
    print(f"{strategy_table(summary['strategy_costs'])}\n")
    print("Next:")
    print(f'  python -m ragjax.ask --run_dir={folder} "your question"')
    print(f"  python -m ragjax.evaluate --run_dir={folder} --split=dev")
    print(f"  python -m ragjax.export --run_dir={folder} --out=exported")
    print(f"  tensorboard --logdir={folder / 'tensorboard'}")


def _check_splits(config: RunConfig, dataset: Dataset, phases: Sequence[Phase]) -> None:
    for split, needed in ((config.eval_split, True), ("train", bool(phases))):
        if needed and not getattr(dataset, split):
            raise UserError(f"{dataset.folder} has no {split} questions: add {split}.jsonl to it.")


def _check_flags(config: RunConfig, folder: Path) -> dict[str, Any] | None:
    """The folder's config.json, None for a new run. Raises UserError where its flags differ from ours."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    record = read_json(path)
    flags = dataclasses.asdict(config)
    differ = [name for name, value in flags.items() if name != "run_dir" and record["flags"].get(name) != value]
    if differ:
        details = ", ".join(f"--{name}={record['flags'].get(name)} (now {flags[name]})" for name in differ)
        raise UserError(f"{folder} holds a run with {details}: repeat those flags or choose another --run_dir.")
    return record


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Two processes on one run folder would mix their records; the lock goes with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--run_dir={folder} cannot be written ({error.strerror}): choose another folder.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another process is working on {folder}: wait for it or choose another --run_dir."
            ) from None
        yield
