"""Which of a phase's states is kept: the best by the dev questions, among the start and what was measured on the way.

An embedder that learns from labels is judged by Recall@5, then MRR@10. Whatever learns from answers is judged by its
dev loss; a state whose embedder finds clearly less than at the start does not count, however low its loss.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ragjax.training.health import Found, RetrievalHealth
from ragjax.training.strategies import Phase

RETRIEVAL = ("recall_at_5", "mrr_at_10")
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Kept:
    """The best state so far."""

    step: int
    figures: Mapping[str, float]  # what it was chosen by, the first above all
    start: Mapping[str, float]  # the same at step 0

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def describe(self, phase: str, rates: str) -> str:
        """One sentence for the user: which state, and why. rates: the flags to try where that is the start."""
        name = next(iter(self.figures))
        before, now = self.start[name], self.figures[name]
        if self.step == 0:
            return (
                f"{phase}: no measured state is better than the start (dev {name} {before:.4g}), so the start is kept "
                f"and the phase changes nothing: try other rates ({rates})."
            )
        return f"{phase}: the state of step {self.step} is kept (dev {name} {before:.4g} -> {now:.4g})."


def criterion(phase: Phase, figures: Mapping[str, float]) -> dict[str, float]:
    """What a state is chosen by, of its dev figures; {} where the dev questions cannot tell."""
    if not phase.signal.reads_answers:
        return {name: figures[name] for name in RETRIEVAL if name in figures}
    # The answers' own likelihood, also where another loss moves the embedder.
    name = "nll_per_answer" if "nll_per_answer" in figures else "loss"
    return {name: figures[name]} if name in figures else {}


def is_better(figures: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Whether a state's `criterion` beats the best one's; a tie goes to the earlier state."""

    def order(values: Mapping[str, float]) -> list[float]:
        return [value if name in RETRIEVAL else -value for name, value in values.items()]

    return all(map(math.isfinite, figures.values())) and order(figures) > order(best)


def finds_less(found: Found, health: RetrievalHealth) -> bool:
    """Whether Recall@5 has fallen since the start by more than the standard error of the questions' differences."""
    if len(found.recalls) < 2:
        return False
    change = found.recalls - health.start.recalls
    error = float(np.std(change, ddof=1)) / math.sqrt(len(change))
    # A single question's fall is exactly one standard error: rounding must not decide whether it counts.
    return bool(change.mean() < -(1 + _ROUNDING) * error)
