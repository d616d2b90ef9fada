"""Which pictures a report has: findings and curves -> figures, each with what it shows in words."""

import dataclasses
from collections.abc import Sequence

from ragjax.costs import PARTS
from ragjax.reporting import figures
from ragjax.reporting.cells import Cell
from ragjax.reporting.curves import PhaseCurves, Search, read_curves
from ragjax.reporting.findings import PairFindings, RowFindings
from ragjax.reporting.formats import METRIC_NAMES, UNITS, in_unit, percent, time_unit
from ragjax.voice import duration


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture in the forms that pages of different width show."""

    title: str
    words: str  # what it shows, for those who do not see it
    forms: dict[str, str]  # SVG by figures.WIDE and NARROW, or "" for one that suits all


@dataclasses.dataclass(frozen=True)
class PairPictures:
    """Of one pair of models; None or () where there is nothing to draw."""

    score: Picture | None
    parts: Picture | None
    losses: Sequence[Picture]
    health: Sequence[Picture]


def draw_pair(pair: PairFindings, cells: Sequence[Cell], unit: str, name: str) -> PairPictures:
    """The pictures of one pair of models. unit: of costs. name: sets their ids apart."""
    measured = [row for row in pair.rows if row.is_measured]
    curves = [(row.label, [read_curves(cell.files) for cell in cells if cell.row == row.row]) for row in pair.rows]
    losses, health = [], []
    for label, runs in curves:
        for phase in dict.fromkeys(curve.phase for run in runs for curve in run):
            those = [curve for run in runs for curve in run if curve.phase == phase]
            number = len(losses)
            losses.append(_loss(f"{label}: {phase}", those, f"{name}-loss-{number}"))
            if any(curve.health for curve in those):
                health.append(_health(f"{label}: {phase}", those, f"{name}-health-{number}"))
    return PairPictures(_score(pair, measured, name), _parts(measured, unit, name), losses, health)


def draw_search(search: Search, name: str) -> list[Picture]:
    """A panel for each phase and each of the winner's metric and the dev loss."""
    panels = []
    for phase in dict.fromkeys(trial["phase"] for trial in search.trials):
        trials = [trial for trial in search.trials if trial["phase"] == phase]
        for metric in dict.fromkeys([search.metric, "dev_loss"]):
            if known := [trial for trial in trials if trial[metric] is not None]:
                words = "; ".join(
                    f"{', '.join(f'{model} {rate:g}' for model, rate in trial['rates'].items())}: {trial[metric]:.4g}"
                    for trial in known
                )
                svg = figures.rate_panel(trials, metric, f"{name}-{len(panels)}")
                panels.append(Picture(f"{phase}: {METRIC_NAMES.get(metric, 'dev loss')}", words, {"": svg}))
    return panels


def _score(pair: PairFindings, rows: Sequence[RowFindings], name: str) -> Picture | None:
    """Score against cost; a single row has nothing to be compared with."""
    metric = pair.metric
    drawn = [
        (row, row.seconds, score)
        for row in rows
        if metric and (score := row.scores.get(metric)) is not None and row.seconds
    ]
    if metric is None or len(drawn) < 2:
        return None
    unit = time_unit(max(seconds for _, seconds, _ in drawn))
    points, words = [], []
    for row, seconds, score in drawn:
        change = row.change[metric]
        # The interval is that of the change, drawn around the score.
        ends = None if change is None else (score - change[0] + change[1], score - change[0] + change[2])
        points.append((row.row, seconds / UNITS[unit], score, ends))
        words.append(f"{row.label} {percent(score)} % for {duration(seconds)}")
    forms = {
        form: figures.cost_and_score(points, metric, unit, form, f"{name}-score-{form}")
        for form in (figures.WIDE, figures.NARROW)
    }
    return Picture(f"{METRIC_NAMES[metric]} against cost", "; ".join(words), forms)


def _parts(rows: Sequence[RowFindings], unit: str, name: str) -> Picture | None:
    if not rows:
        return None
    bars = [(row.label, {part: row.parts[part] / UNITS[unit] for part in PARTS}) for row in rows]
    words = "; ".join(
        f"{row.label}: {', '.join(f'{part} {in_unit(row.parts[part], unit)}' for part in PARTS)} {unit}" for row in rows
    )
    forms = {
        form: figures.cost_parts(bars, "evaluation", unit, form, f"{name}-parts-{form}")
        for form in (figures.WIDE, figures.NARROW)
    }
    return Picture("Where the cost went", words, forms)


def _loss(title: str, runs: Sequence[PhaseCurves], name: str) -> Picture:
    words = "; ".join(
        f"{kind} loss from {points[0][1]:.4g} to {points[-1][1]:.4g} at step {points[-1][0]:.0f}"
        for curves in runs
        for kind, points in (("training", curves.train_loss), ("dev", curves.dev_loss))
        if points
    )
    return Picture(title, words, {"": figures.loss_panel(runs, name)})


def _health(title: str, runs: Sequence[PhaseCurves], name: str) -> Picture:
    words = "; ".join(
        f"{label} from {points[0][1]:.3f} to {points[-1][1]:.3f}"
        for curves in runs
        for label, points in curves.health.items()
    )
    return Picture(title, words, {"": figures.health_panel(runs, name)})
