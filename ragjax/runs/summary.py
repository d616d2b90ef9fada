"""What a finished run has found: scores before and after, costs, the retrieval."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

Scores = Mapping[str, float | None]  # by metric; None where no question has labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """The fields of summary.json, in its order. Those with a default are missing in the oldest runs."""

    strategy: str  # never auto: what that has picked
    objective: str | None  # None where no phase has one
    split: str  # of the questions
    n: int  # questions
    before: Scores
    after: Scores
    # By metric: the mean change, and the ends of its 95% interval.
    change_95: Mapping[str, Sequence[float] | None] = dataclasses.field(default_factory=dict)
    cost: Mapping[str, Any]  # seconds, flops and tokens: of training, and of each part and phase
    strategy_costs: Sequence[Mapping[str, Any]] = ()  # seconds of one epoch of each strategy
    skipped_questions: int = 0  # training questions without labels, where a phase learns from labels
    # By phase: training steps whose loss or gradient was not finite, and whose update was skipped.
    skipped_steps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # By phase: the share of its wall-clock, measurements on the dev questions apart, that lay inside compiled steps.
    step_share: Mapping[str, float] = dataclasses.field(default_factory=dict)
    peak_memory_bytes: int
    retrieval: Mapping[str, Any]  # index, top_k, score_scale, passages_per_second, passages_cut
    # By phase: the step of the state that is kept, what it was chosen by, and that at the start; None: the last state.
    kept: Mapping[str, Mapping[str, Any] | None] = dataclasses.field(default_factory=dict)
