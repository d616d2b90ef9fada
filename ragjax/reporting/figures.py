"""Pictures of results. The only file that imports matplotlib.

Those of a page are SVG to be put into it: their colours are the page's CSS variables, so that they are legible on a
light and on a dark ground, their texts are text in the page's font, and the same figures give the same bytes. No text
of the data stands in them. Lines and marks differ in form, not in colour alone.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ragjax.files import write_atomic
from ragjax.reporting.cells import LABELS
from ragjax.reporting.curves import PhaseCurves, Points
from ragjax.reporting.formats import METRIC_NAMES

# Colours that stand for the page's: what is drawn in one of them takes the variable's colour.
_INK, _FAINT, _GROUND = "#010203", "#040506", "#070809"
_SERIES = [f"#0a0b{number:02x}" for number in range(1, 8)]
_VARIABLES = {_INK: "--ink", _FAINT: "--rule", _GROUND: "--ground"} | {
    colour: f"--series-{number}" for number, colour in enumerate(_SERIES, 1)
}
_MARKERS = ("x", "v", "s", "D", "P", "o", "^")
_LINES = ("-", "--", ":")
_HATCHES = ("", "//", "--", "xx")
_LOOK: Any = {
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "hatch.color": _GROUND,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "ragjax",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
WIDE, NARROW = "wide", "narrow"
# What makes a file of matplotlib's an element of a page; {} is the figure's name.
_MENDED = (
    (r"\A.*?<svg ", '<svg aria-hidden="true" focusable="false" '),
    (r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", ""),
    (r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1"),
    (r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1"),
    # The page's own font: the size stays, the family goes.
    (r"font: ([\d.]+px) [^;\"]*", r"font-size: \1"),
    (r" ?font-family: [^;\"]*;", ""),
    (r'\bid="', 'id="{}-'),
    (r"url\(#", "url(#{}-"),
    (r'href="#', 'href="#{}-'),
    (r"(\d\.\d\d)\d+", r"\1"),  # a hundredth of a point is finer than any screen
)
_SIZES = {WIDE: (7.4, 3.6), NARROW: (4.2, 4.6)}  # inches; a panel of several has its own
_PANEL = (4.2, 2.5)


def cost_and_score(
    rows: Sequence[tuple[str, float, float, tuple[float, float] | None]], metric: str, unit: str, form: str, name: str
) -> str:
    """The main picture as SVG: a score against the cost of training.

    rows: (row, cost in `unit`, score 0..1, the ends 0..1 of the score's interval or None). form: WIDE or NARROW. name:
    of the picture in its page.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row, cost, score, ends in rows:
            place = list(LABELS).index(row)
            errors = None if ends is None else [[100 * (score - ends[0])], [100 * (ends[1] - score)]]
            axes.errorbar(
                [cost], [100 * score], errors, fmt=_MARKERS[place], color=_SERIES[place], markersize=8, capsize=3,
                elinewidth=1.2, label=LABELS[row],
            )  # fmt: skip
        if baseline := next((score for row, _, score, _ in rows if row == "none"), None):
            axes.axhline(100 * baseline, color=_INK, linewidth=0.8, linestyle=":")
        costs = [cost for _, cost, _, _ in rows]
        axes.set(xscale="log", xlabel=f"training, {unit} (logarithmic)", ylabel=f"{METRIC_NAMES[metric]}, %")
        axes.set_xlim(min(costs) / 1.5, max(costs) * 1.5)
        _label_decades(axes, "{x:g}")
        axes.grid(axis="y")
        place, columns = ("outside lower center", 3) if form == NARROW else ("outside right center", 1)
        figure.legend(loc=place, ncols=columns, handletextpad=0.4, columnspacing=1.0)

    return _svg(draw, _SIZES[form], name)


def cost_parts(rows: Sequence[tuple[str, Mapping[str, float]]], apart: str, unit: str, form: str, name: str) -> str:
    """Stacked bars as SVG: where the cost of each row went, and apart from it what measuring took.

    rows: (label, {part: cost in `unit`}), the first on top. apart: the part with a bar of its own.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        parts = [part for part in rows[0][1] if part != apart]
        places = [2.6 * place for place in range(len(rows))]
        starts = [0.0] * len(rows)
        for number, part in enumerate(parts):
            widths = [costs[part] for _, costs in rows]
            axes.barh(places, widths, 1.0, starts, color=_SERIES[number], hatch=_HATCHES[number], label=part,
                      edgecolor=_GROUND, linewidth=0.4)  # fmt: skip
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        axes.barh([place + 0.9 for place in places], [costs[apart] for _, costs in rows], 0.55, color="none",
                  edgecolor=_INK, linewidth=0.7, label=f"{apart} (apart)")  # fmt: skip
        axes.set_yticks([place + 0.3 for place in places], [label for label, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        figure.legend(
            loc="outside lower center", ncols=3 if form == NARROW else 5, handletextpad=0.5, columnspacing=1.0
        )

    return _svg(draw, (_SIZES[form][0], 1.3 + 0.42 * len(rows)), name)


def loss_panel(runs: Sequence[PhaseCurves], name: str) -> str:
    """One phase's training and dev loss by step as SVG, a pair of lines for each seed."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, curves in enumerate(runs):
            labels = ("training", "dev") if number == 0 else (None, None)
            _line(axes, curves.train_loss, _SERIES[3], label=labels[0], linewidth=0.9)
            _line(axes, curves.dev_loss, _SERIES[5], label=labels[1], marker="o", markersize=4, linestyle="--")
        axes.set(xlabel="step", ylabel="loss")
        axes.grid(axis="y")
        axes.legend()

    return _svg(draw, _PANEL, name)


def health_panel(runs: Sequence[PhaseCurves], name: str) -> str:
    """What a moving embedder finds for the dev questions, by step, as SVG; all of it as shares."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, curves in enumerate(runs):
            for place, (label, points) in enumerate(curves.health.items()):
                _line(
                    axes, points, _SERIES[(3, 5, 1)[place]], linestyle=_LINES[place], marker="os^"[place], markersize=4,
                    label=label if number == 0 else None,
                )  # fmt: skip
        axes.set(xlabel="step", ylabel="share")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=1)

    return _svg(draw, (_PANEL[0], 3.1), name)


def rate_panel(trials: Sequence[Mapping], metric: str, name: str) -> str:
    """One phase of a learning-rate search as SVG: `metric` against the rate."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_prop_cycle(color=_SERIES[3:] + _SERIES[:3])
        _draw_rates(axes, trials, metric, METRIC_NAMES.get(metric, metric.replace("_", " ")))
        axes.grid(axis="y")
        _label_decades(axes, "{x:.0e}", (1,))

    return _svg(draw, _PANEL, name)


def plot_rates(trials: Sequence[Mapping], metric: str, path: Path) -> None:
    """A learning-rate search as a PNG: `metric` and the dev loss against the rate, a panel for each phase.

    trials: of search.json. Trials of pairs get a line for each of the generator's rates. Raises UserError when the file
    cannot be written.
    """
    phases = list(dict.fromkeys(trial["phase"] for trial in trials))
    names = list(dict.fromkeys([metric, "dev_loss"]))
    figure = Figure(figsize=(5 * len(phases), 3.2 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), len(phases), squeeze=False)
    for row, name in zip(panels, names, strict=True):
        for axes, phase in zip(row, phases, strict=True):
            _draw_rates(axes, [trial for trial in trials if trial["phase"] == phase], name, name)
            axes.set_title(phase)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_atomic(path, content.getvalue())


def _draw_rates(axes: Axes, trials: Sequence[Mapping], name: str, label: str) -> None:
    """One phase's figure against its model's rate, in the colours of the axes."""
    model, lines = _lines(trials, name)
    for number, (rate, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), marker="o", linestyle=_LINES[number % len(_LINES)], label=rate)
    axes.set(xscale="log", xlabel=f"{model}_lr", ylabel=label)
    if len(lines) > 1:
        axes.legend(title="generator_lr")


def _label_decades(axes: Axes, form: str, between: Sequence[float] = (1, 2, 5)) -> None:
    """Plain numbers on a logarithmic axis, also where it spans less than a decade."""
    axes.xaxis.set_major_locator(LogLocator(subs=between))
    axes.xaxis.set_major_formatter(form)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _lines(trials: Sequence[Mapping], name: str) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """(the model on the axis, {label: points})."""
    model = "embedder" if "embedder" in trials[0]["rates"] else "generator"
    lines: dict[str, list[tuple[float, float]]] = {}
    for trial in sorted(trials, key=lambda trial: trial["rates"][model]):
        if trial[name] is not None:
            other = trial["rates"].get("generator", 0.0) if model == "embedder" else 0.0
            lines.setdefault(f"{other:g}", []).append((trial["rates"][model], trial[name]))
    return model, lines


def _line(axes: Axes, points: Points, colour: str, **style) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, **style)


def _svg(draw: Callable[[Figure], None], size: tuple[float, float], name: str) -> str:
    """A figure as an element of a page; `name` sets its ids apart from other figures'."""
    content = io.StringIO()
    with matplotlib.rc_context(_LOOK):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = content.getvalue()
    for pattern, new in [(pattern.format(name), new.format(name)) for pattern, new in _MENDED]:
        text = re.sub(pattern, new, text, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text
