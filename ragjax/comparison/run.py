"""A whole comparison: the plan, the searches and runs of its matrix, and the report.

    comparison.json      what is compared: the flags that all runs share
    cells/               a run folder for each cell: PAIR/seedN/ROW
    searches/            with --search, the learning-rate searches of each pair
    report.*             what was found, as HTML, Markdown, CSV and JSON

A cell that fails is shown as such, and the others go on. The same command continues an unfinished comparison; more
rows, seeds or models may be asked for, and what is there already is not run again.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ragjax.comparison.execution import Execution
from ragjax.comparison.matrix import Planned, plan_cells
from ragjax.config import CompareConfig, RunConfig
from ragjax.data.dataset import load_dataset
from ragjax.errors import UserError
from ragjax.evaluation import comparison_table
from ragjax.fields import changed_flags
from ragjax.files import write_json
from ragjax.parallel import refuse_several_processes
from ragjax.reporting import Report, write_report
from ragjax.runs import RunFolder
from ragjax.training.run import warn_of_repeated_questions
from ragjax.training.strategies import check_refreshing
from ragjax.voice import say

# The options that decide a run's result; the others may differ from one command to the next on the same folder.
_DECISIVE = ("search", "embedder_rates")


def compare(config: RunConfig, options: CompareConfig | None = None) -> Report | None:
    """Runs what is left of a comparison, and reports on all of it.

    Args:
      config: the flags that all runs share. Its strategy, models and seed are those of no run: `options` has them.
        `run_dir`, the comparison's folder, may be empty for runs/compare.
      options: the rows, models and seeds.

    Returns:
      What was written; None for a dry run.

    Raises:
      UserError: bad input, a folder that holds another comparison, too little disk, no run that came to its end, or one
        of several processes.
    """
    options = options or CompareConfig()
    refuse_several_processes()
    config = dataclasses.replace(config, run_dir=str(RunFolder(Path(config.run_dir or "runs/compare")).path.absolute()))
    cells = plan_cells(config, options)
    files = RunFolder(Path(config.run_dir))
    _check_folder(files, config, options)
    dataset = load_dataset(config.data)
    if options.search and not dataset.dev:
        raise UserError(
            f"{dataset.folder} has no dev questions, by which --search chooses: add {dataset.split_file('dev')}, or "
            "leave --search out."
        )
    _check_refreshing(config, options, cells)
    warn_of_repeated_questions(dataset, [phase for cell in cells for phase in cell.phases])
    comparison = Execution(config, options, cells, dataset)
    if options.dry_run:
        comparison.plan()
        return None
    with files.held():
        _write_record(files, config, options)
        comparison.plan()
        comparison.run()
        report = write_report(
            comparison.reported(),
            files.path,
            command=_command(config, options),
            title=f"{dataset.name}: which strategy?",
            searches=comparison.searches(),
            with_texts=options.texts,
        )
    _print(report)
    failures = [cell.failure for cell in comparison.reported()]
    if all(failures):
        raise UserError(f"no run has a result: {failures[0]}")
    return report


def _check_refreshing(config: RunConfig, options: CompareConfig, cells: Sequence[Planned]) -> None:
    """Raises UserError where --refresh_passages does not go with what is asked: no run would have to find it out."""
    if not config.refresh_passages:
        return
    moving = [phase for cell in cells for phase in cell.phases if "embedder" in phase.trains]
    if not moving:
        raise UserError(
            f"--refresh_passages={config.refresh_passages} follows an embedder that moves, and --strategies="
            f"{','.join(options.strategies)} train none: leave it out."
        )
    check_refreshing(config, moving)
    if options.search:
        raise UserError(
            f"--refresh_passages={config.refresh_passages} makes vectors for one embedder, and --search trains copies "
            "of it at many rates together: leave one of them out."
        )


def _check_folder(files: RunFolder, config: RunConfig, options: CompareConfig) -> None:
    """Raises UserError where the folder holds another comparison, or something else."""
    if not files.comparison_file.is_file():
        if files.is_begun or files.search_file.is_file():
            raise UserError(f"{files.path} holds a run: choose another --run_dir for the comparison.")
        return
    free = [field.name for field in dataclasses.fields(options) if field.name not in _DECISIVE]
    asked = {"flags": config, "options": options}
    files.read_asked("comparison", files.comparison_file, asked, free=["run_dir", *free])


def _write_record(files: RunFolder, config: RunConfig, options: CompareConfig) -> None:
    parts = {"flags": config, "options": options}
    write_json(files.comparison_file, {name: dataclasses.asdict(part.located()) for name, part in parts.items()})


def _command(config: RunConfig, options: CompareConfig) -> str:
    """The command that makes this comparison, as a shell takes it from any directory."""
    flags = changed_flags(config.located(), RunConfig()) + changed_flags(options.located(), CompareConfig())
    return " ".join(["python -m ragjax.compare", *flags])


def _print(report: Report) -> None:
    for pair in report.findings.pairs:
        rows = [
            {
                "label": row.label,
                **{name: row.scores.get(name) for name in ("em", "f1", "recall_at_5")},
                "change": row.change.get("f1"),
                "seconds": row.seconds,
                "relative": row.relative,
            }
            for row in pair.rows
        ]
        say(f"\n{pair.embedder} + {pair.generator}, {pair.n} {pair.split} questions\n")
        say(comparison_table(rows))
        for row in pair.rows:
            for sentence in row.failures:
                say(f"{row.label} has no result: {sentence}")
    say("\n" + "\n".join(report.advice))
    say(f"\nreport: {report.html}")
