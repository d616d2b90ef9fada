"""Pictures of results. The only file that imports matplotlib."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ragjax.files import write_atomic


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
            model, lines = _lines([trial for trial in trials if trial["phase"] == phase], name)
            for label, points in lines.items():
                axes.plot(*zip(*points, strict=True), marker="o", label=label)
            axes.set(xscale="log", xlabel=f"{model}_lr", ylabel=name, title=phase)
            if len(lines) > 1:
                axes.legend(title="generator_lr")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_atomic(path, content.getvalue())


def _lines(trials: Sequence[Mapping], name: str) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """(the model on the axis, {label: points})."""
    model = "embedder" if "embedder" in trials[0]["rates"] else "generator"
    lines: dict[str, list[tuple[float, float]]] = {}
    for trial in sorted(trials, key=lambda trial: trial["rates"][model]):
        if trial[name] is not None:
            other = trial["rates"].get("generator", 0.0) if model == "embedder" else 0.0
            lines.setdefault(f"{other:g}", []).append((trial["rates"][model], trial[name]))
    return model, lines
