"""Run folders -> every number of a report: means, paired intervals, costs, by row and pair of models."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ragjax.costs import PARTS
from ragjax.errors import UserError
from ragjax.evaluation import METRICS, seeds_interval
from ragjax.evaluation.statistics import Interval
from ragjax.files import read_json_lines
from ragjax.metrics import mean_of_defined
from ragjax.reporting.cells import LABELS, REFERENCE, Cell, shown
from ragjax.runs import RunRecord, Summary
from ragjax.runs.summary import Scores

# What rows are ordered by: the first that is known, then the others.
RANKING = ("f1", "em", "recall_at_5")

Values = Mapping[str, Sequence[float | None]]  # by metric: [n], one a question
Intervals = Mapping[str, Interval | None]  # by metric


@dataclasses.dataclass(frozen=True)
class CellFindings:
    """One run. Without a summary there is no result, and `failure` says why."""

    row: str
    seed: int
    folder: str
    failure: str
    summary: Summary | None
    # Phases whose last state was kept for want of dev questions.
    unselected_phases: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RowFindings:
    """One strategy with one pair of models, over the seeds that have a result."""

    row: str
    label: str  # the paper's
    seeds: tuple[int, ...]
    failures: tuple[str, ...]  # a sentence for each seed without a result
    scores: Scores  # mean over seeds of the mean over questions, 0..1
    change: Intervals  # against the untrained models: (mean, low, high); None of the row "none"
    behind: Intervals  # the best row's lead over this one: (mean, low, high); None of the best row itself
    seconds: float | None  # of training, mean over seeds: embedder + generator + search + encode
    relative: float | None  # to the row "generator"
    parts: Mapping[str, float]  # seconds by part, evaluation too; {} without a result
    cells: tuple[CellFindings, ...]

    @property
    def is_measured(self) -> bool:
        return bool(self.seeds)


@dataclasses.dataclass(frozen=True)
class PairFindings:
    """Every row of one embedder with one generator."""

    embedder: str
    generator: str
    split: str  # "" where no cell has a result
    n: int  # questions
    counts: Mapping[str, int]  # questions by metric that have it
    before: Scores  # of the untrained models
    metric: str | None  # what the rows are ordered by: f1, or recall_at_5 where no answers were measured
    best: str | None  # the row whose mean is the highest
    rows: tuple[RowFindings, ...]  # in the paper's order

    def row(self, name: str) -> RowFindings | None:
        return next((row for row in self.rows if row.row == name), None)


@dataclasses.dataclass(frozen=True)
class Findings:
    """Every number of a report but those of curves, examples and set-up."""

    title: str
    command: str
    pairs: tuple[PairFindings, ...]

    @property
    def cells(self) -> list[CellFindings]:
        return [cell for pair in self.pairs for row in pair.rows for cell in row.cells]


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A cell with a result: its summary and the values of its questions."""

    cell: Cell
    summary: Summary
    ids: Sequence[str]
    before: Values
    after: Values


def find(cells: Sequence[Cell], title: str, command: str, with_places: bool = True) -> Findings:
    """What the runs of `cells` have found.

    with_places: False cuts paths to their last name, as folders differ between machines.

    Raises:
      UserError: a cell of no known row, twice there, unfinished without a failure, or measured on other questions than
        the rest of its pair; a damaged file.
    """
    if not cells:
        raise UserError("there is no run to report on: give at least one.")
    _check(cells)
    return Findings(title, command, tuple(_pair(those, with_places) for those in by_pair(cells)))


def by_pair(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each pair of models, in the order of `Findings.pairs`."""
    pairs: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        pairs.setdefault((cell.embedder, cell.generator), []).append(cell)
    return list(pairs.values())


def record_of(cell: Cell) -> RunRecord | None:
    """What a cell's config.json says; None where a failed run has left none, or one that is damaged."""
    try:
        return cell.files.record()
    except UserError:
        if not cell.failure:
            raise
        return None


def _check(cells: Sequence[Cell]) -> None:
    seen = set()
    for cell in cells:
        key = (cell.row, cell.embedder, cell.generator, cell.seed)
        if cell.row not in LABELS:
            raise UserError(f"a report has no row {cell.row!r}: choose from {', '.join(LABELS)}.")
        if key in seen:
            raise UserError(f"{cell.files.path} is a second {cell.row} of seed {cell.seed}: report on one of the two.")
        seen.add(key)
        if not (cell.failure or cell.files.is_finished):
            raise UserError(f"{cell.files.path} is not finished: run its command again, then report on it.")


def _pair(cells: Sequence[Cell], with_places: bool) -> PairFindings:
    measured = [_measure(cell) for cell in cells if not cell.failure]
    _check_same_questions(measured)
    by_row = {row: [m for m in measured if m.cell.row == row] for row in LABELS}
    scores = {row: _mean_scores(those) for row, those in by_row.items()}
    seconds = {row: _mean([m.summary.cost["seconds"] for m in those]) for row, those in by_row.items()}
    metric = next((name for name in RANKING if any(each.get(name) is not None for each in scores.values())), None)
    best = _best(scores, seconds, metric)
    first = measured[0] if measured else None
    rows = {row: [cell for cell in cells if cell.row == row] for row in LABELS}
    return PairFindings(
        shown(cells[0].embedder, with_places),
        shown(cells[0].generator, with_places),
        split=first.summary.split if first else "",
        n=len(first.ids) if first else 0,
        counts={name: sum(v is not None for v in first.before[name]) for name in METRICS} if first else {},
        before=_before(by_row, measured),
        metric=metric,
        best=best,
        rows=tuple(
            _row(row, those, by_row[row], by_row.get(best or "", []), seconds, with_places)
            for row, those in rows.items()
            if those
        ),
    )


def _measure(cell: Cell) -> _Measured:
    summary = cell.files.read_summary()
    if summary is None:
        raise UserError(f"{cell.files.path} is not finished: run its command again, then report on it.")
    before = read_json_lines(cell.files.measured(summary.split, "before"))
    # What trains nothing has measured once.
    after = before if summary.strategy == "none" else read_json_lines(cell.files.measured(summary.split, "after"))
    ids = [line["id"] for line in before]
    if ids != [line["id"] for line in after]:
        raise UserError(f"{cell.files.predictions_folder} has other questions after training than before: run it anew.")
    return _Measured(
        cell, summary, ids, *({name: [x[name] for x in side] for name in METRICS} for side in (before, after))
    )


def _check_same_questions(measured: Sequence[_Measured]) -> None:
    """Differences are taken question by question."""
    for one in measured[1:]:
        if one.ids != measured[0].ids:
            raise UserError(
                f"{one.cell.files.path} and {measured[0].cell.files.path} were measured on different questions, so "
                "they cannot be compared: give both the same --data, --eval_split and --eval_limit."
            )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _mean_scores(measured: Sequence[_Measured]) -> Scores:
    return {name: mean_of_defined(m.summary.after.get(name) for m in measured) for name in METRICS} if measured else {}


def _before(by_row: Mapping[str, Sequence[_Measured]], measured: Sequence[_Measured]) -> Scores:
    """Of the untrained models: the first cell that has answered, if any has, as a run may measure retrieval alone."""
    every = [*by_row["none"], *measured]
    return {
        name: next((m.summary.before[name] for m in every if m.summary.before.get(name) is not None), None)
        for name in METRICS
    }


def _best(scores: Mapping[str, Scores], seconds: Mapping[str, float | None], metric: str | None) -> str | None:
    """The row with the highest mean; of equal ones by the other metrics, then the cheapest, then the paper's order."""
    if metric is None:
        return None
    names = [metric, *(name for name in RANKING if name != metric)]

    def order(row: str) -> tuple[float, ...]:
        known = [scores[row].get(name) for name in names]
        return (*(-1.0 if value is None else value for value in known), -(seconds[row] or 0.0))

    return max((row for row in LABELS if scores[row].get(metric) is not None), key=order)


def _row(
    row: str,
    cells: Sequence[Cell],
    measured: Sequence[_Measured],
    best: Sequence[_Measured],
    seconds: Mapping[str, float | None],
    with_places: bool,
) -> RowFindings:
    own, reference = seconds[row], seconds[REFERENCE]
    is_best = bool(measured) and measured == best
    by_cell = {id(m.cell): m.summary for m in measured}
    return RowFindings(
        row=row,
        label=LABELS[row],
        seeds=tuple(m.cell.seed for m in measured),
        failures=tuple(cell.failure for cell in cells if cell.failure),
        scores=_mean_scores(measured),
        change={name: None if row == "none" else _change(measured, name) for name in METRICS},
        behind={name: None if is_best else _lead(best, measured, name) for name in METRICS},
        seconds=own,
        relative=None if own is None or not reference else own / reference,
        parts={part: sum(m.summary.cost[part]["seconds"] for m in measured) / len(measured) for part in PARTS}
        if measured
        else {},
        cells=tuple(_cell(cell, by_cell.get(id(cell)), with_places) for cell in cells),
    )


def _cell(cell: Cell, summary: Summary | None, with_places: bool) -> CellFindings:
    record, kept = record_of(cell), summary.kept if summary else {}
    # A phase taken over from another run was selected there.
    unselected = [
        phase
        for phase, state in kept.items()
        if state is None and record and record.config.keep == "best" and not getattr(record.config, f"{phase}_run", "")
    ]
    folder = shown(str(cell.files.path), with_places)
    return CellFindings(cell.row, cell.seed, folder, cell.failure, summary, tuple(unselected))


def _change(measured: Sequence[_Measured], name: str) -> Interval | None:
    return _interval([m.before[name] for m in measured], [m.after[name] for m in measured])


def _lead(best: Sequence[_Measured], other: Sequence[_Measured], name: str) -> Interval | None:
    """How far the best row is ahead, question by question, under the seeds that both have.

    What is not trained has no seed, so it goes with each of the other's. Rows without a common seed are compared in
    their means over seeds.
    """
    if not best or not other:
        return None
    ahead, behind = ({m.cell.seed: m.after[name] for m in side} for side in (best, other))
    if best[0].cell.row == "none":
        ahead = dict.fromkeys(behind, best[0].after[name])
    if other[0].cell.row == "none":
        behind = dict.fromkeys(ahead, other[0].after[name])
    if common := [seed for seed in ahead if seed in behind]:
        return _interval([behind[seed] for seed in common], [ahead[seed] for seed in common])
    return _interval([_over_seeds(behind)], [_over_seeds(ahead)])


def _over_seeds(values: Mapping[int, Sequence[float | None]]) -> list[float | None]:
    return [mean_of_defined(column) for column in zip(*values.values(), strict=True)]


def _interval(before: Sequence[Sequence[float | None]], after: Sequence[Sequence[float | None]]) -> Interval | None:
    """Of after - before [S, n], over the questions that have all their values."""
    columns = [
        [new - old for old, new in zip(olds, news, strict=True)]
        for olds, news in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True)
        if None not in olds and None not in news
    ]
    return seeds_interval([list(row) for row in zip(*columns, strict=True)]) if columns else None


def as_json(findings: Findings) -> dict[str, Any]:
    """The findings under the names of their fields: what report.json holds (docs/report.md)."""
    return dataclasses.asdict(findings)
