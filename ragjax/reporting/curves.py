"""What metrics.jsonl and search.json have to be drawn: losses and the retrieval's health by step, scores by rate."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ragjax.config import SearchConfig
from ragjax.files import read_json_object, read_whole_lines
from ragjax.runs import RunFolder

# A curve of more steps is drawn as the means of this many stretches.
_MOST_POINTS = 120
# The retrieval's figures as shares: what passages are counted as, against the start.
_HEALTH = {"dev_recall_at_5": "Recall@5", "dev_top_k_agreement": "agreement with the start"}
_DISTINCT = "dev_distinct_passages_per_100"

Points = Sequence[tuple[float, float]]  # (step, value)


@dataclasses.dataclass(frozen=True)
class PhaseCurves:
    """One phase of one run."""

    phase: str
    train_loss: Points
    dev_loss: Points
    health: Mapping[str, Points]  # shares by name; {} where the embedder does not move or nothing was measured


@dataclasses.dataclass(frozen=True)
class Search:
    """A learning-rate search: what search.json says of it."""

    folder: str
    strategy: str
    metric: str  # what the winner was chosen by
    trials: Sequence[Mapping[str, Any]]
    winner: Mapping[str, float]  # {} of an unfinished search
    seconds: float | None  # of training; None of an unfinished search


def read_curves(files: RunFolder) -> list[PhaseCurves]:
    """Every phase that was trained in this folder, in order; [] where nothing was."""
    mend = "repair or remove that line, which records a step of training"
    lines: dict[str, list[dict[str, Any]]] = {}
    for _, (phase, line) in read_whole_lines(files.metrics_file, lambda line: (line["phase"], line), mend):
        lines.setdefault(phase, []).append(line)
    return [_phase(name, those) for name, those in lines.items()]


def _phase(name: str, lines: Sequence[Mapping[str, Any]]) -> PhaseCurves:
    health = {label: points for key, label in _HEALTH.items() if (points := _points(lines, key))}
    distinct = _points(lines, _DISTINCT)
    if distinct and distinct[0][1]:
        health["different passages, of the start's"] = [(step, value / distinct[0][1]) for step, value in distinct]
    return PhaseCurves(name, _thinned(_points(lines, "loss")), _points(lines, "dev_loss"), health)


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _thinned(points: Points) -> Points:
    if len(points) <= _MOST_POINTS:
        return points
    stretches = np.array_split(np.array(points), _MOST_POINTS)
    return [(float(step), float(value)) for step, value in (stretch.mean(axis=0) for stretch in stretches)]


def read_search(files: RunFolder) -> Search:
    """A search, finished or not. Raises UserError where the folder holds none."""
    record = read_json_object(files.search_file)
    flags, cost = record["flags"], record.get("cost")
    return Search(
        folder=str(files.path),
        strategy=record.get("strategy", flags["strategy"]),
        metric=SearchConfig(**record["options"]).selection(flags["decode"]),
        trials=record["trials"],
        winner=record.get("winner", {}),
        seconds=cost and cost["seconds"],
    )
