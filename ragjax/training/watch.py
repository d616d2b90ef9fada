"""What a phase remembers of its losses: the steps that were skipped, and what loss is far above those before it.

A spike is a loss more than five robust standard deviations above the median of up to 64 losses before it, from the 17th
on: Hampel's identifier, by which outliers do not hide one another (Davies and Gather 1993, JASA 88). In the recorded
runs on HotPotQA (150 steps each) that is the one step which stands out to the eye, and in PopQA's 75 steps none.
"""

import itertools
import statistics
from collections.abc import Collection, Iterable
from typing import Any

_WINDOW, _FEWEST = 64, 16
_DEVIATIONS = 5.0
_NORMAL = 1.4826  # a normal distribution's standard deviation, in median absolute deviations


class LossWatch:
    """Its state travels in the checkpoint, so that a resumed run sees the same spikes."""

    def __init__(self, skipped: Iterable[int] = (), losses: Iterable[float] = ()):
        self.skipped = list(skipped)  # steps
        self._losses = list(losses)  # the last ones that were finite, oldest first

    def as_dict(self) -> dict[str, Any]:
        """What makes the same watch again."""
        return {"skipped": self.skipped, "losses": self._losses}

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss is far above those before it; it is one of those to come."""
        before = self._losses
        self._losses = [*before, loss][-_WINDOW:]
        if len(before) < _FEWEST:
            return False
        middle = statistics.median(before)
        deviation = _NORMAL * statistics.median(abs(value - middle) for value in before)
        return 0 < _DEVIATIONS * deviation < loss - middle


def in_a_row(skipped: Collection[int], step: int) -> int:
    """How many steps up to `step` were skipped one after another."""
    return next(count for count in itertools.count() if step - count not in skipped)
