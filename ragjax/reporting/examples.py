"""Questions whose answer changed most, for the better and for the worse, with what was retrieved for them."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ragjax.data.dataset import load_dataset
from ragjax.errors import UserError
from ragjax.files import read_json_lines
from ragjax.reporting.cells import Cell
from ragjax.runs import Summary

# Shown of each kind.
_SHOWN = 4
# Larger data are not read for the sake of a few titles, bytes of all files.
_LARGEST_DATA = 64 << 20


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """A passage that was read."""

    id: str
    probability: float
    title: str  # "" where the data are not at hand
    text: str


@dataclasses.dataclass(frozen=True)
class Side:
    """Before or after training."""

    prediction: str | None
    scores: Mapping[str, float | None]  # em, f1, recall_at_5
    passages: Sequence[Retrieved]  # best first


@dataclasses.dataclass(frozen=True)
class Example:
    """One question. Without texts there is its id alone."""

    id: str
    question: str
    answers: Sequence[str]
    before: Side
    after: Side

    @property
    def finds_the_same(self) -> bool:
        """Whether the same passages are read in the same order."""
        return [found.id for found in self.before.passages] == [found.id for found in self.after.passages]


@dataclasses.dataclass(frozen=True)
class Examples:
    """What changed most in one run."""

    metric: str
    better: Sequence[Example]
    worse: Sequence[Example]
    counts: Mapping[str, int]  # questions that are "better", "worse", "equal"
    with_titles: bool  # whether the data were at hand


def find_examples(cell: Cell, summary: Summary, metric: str, with_texts: bool) -> Examples | None:
    """Of a finished run that has trained something; None where no question has the metric.

    metric: what tells better from worse; EM, then Recall@5, decide between equal changes.
    """
    before, after = (read_json_lines(cell.files.measured(summary.split, moment)) for moment in ("before", "after"))
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a[metric] is not None and b[metric] is not None]
    if not pairs:
        return None

    def change(pair: tuple[Mapping[str, Any], Mapping[str, Any]]) -> tuple[float, ...]:
        return tuple((pair[1][name] or 0.0) - (pair[0][name] or 0.0) for name in (metric, "em", "recall_at_5"))

    ordered = sorted(pairs, key=change)
    worse = [pair for pair in ordered if change(pair)[0] < 0]
    better = [pair for pair in reversed(ordered) if change(pair)[0] > 0]
    texts = _texts(cell) if with_texts else {}
    return Examples(
        metric,
        *([_example(*pair, texts, with_texts) for pair in those[:_SHOWN]] for those in (better, worse)),
        {"better": len(better), "worse": len(worse), "equal": len(pairs) - len(better) - len(worse)},
        bool(texts),
    )


def _texts(cell: Cell) -> Mapping[str, tuple[str, str]]:
    """(title, text) of every passage, where the run's data are still where it found them and not too many; else {}."""
    record = cell.files.record()
    folder = Path(record.config.data)  # or a name, which is no folder and ships with the package
    try:
        if sum(path.stat().st_size for path in folder.glob("*") if path.is_file()) > _LARGEST_DATA:
            return {}
        dataset = load_dataset(record.config.data)
    except (UserError, OSError):
        return {}
    if dataset.sha256 != record.inputs["data"]["sha256"]:
        return {}
    return {passage.id: (passage.title, passage.text) for passage in dataset.passages}


def _example(
    before: Mapping[str, Any], after: Mapping[str, Any], texts: Mapping[str, tuple[str, str]], with_texts: bool
) -> Example:
    return Example(
        before["id"],
        before["question"] if with_texts else "",
        before["answers"] if with_texts else (),
        *(_side(line, texts, with_texts) for line in (before, after)),
    )


def _side(line: Mapping[str, Any], texts: Mapping[str, tuple[str, str]], with_texts: bool) -> Side:
    passages = [
        Retrieved(found["id"], found["probability"], *texts.get(found["id"], ("", ""))) for found in line["passages"]
    ]
    scores = {name: line[name] for name in ("em", "f1", "recall_at_5")}
    return Side(line["prediction"] if with_texts else None, scores, passages)
