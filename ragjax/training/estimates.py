"""What each strategy costs on a run's data, side by side: phases that ran as measured, the others from their parts."""

import dataclasses
from collections.abc import Mapping, Sequence

from ragjax.costs import Ledger, ModelSize, forward_flops, train_flops
from ragjax.training.strategies import STRATEGIES, Phase


@dataclasses.dataclass(frozen=True)
class MeasuredPhase:
    """What a phase has cost, and on how many questions it trained, repetitions counted."""

    cost: Ledger
    questions: int


@dataclasses.dataclass(frozen=True)
class StrategyCost:
    """Seconds of training one epoch of each phase; None where the run's figures do not tell."""

    strategy: str
    seconds: float | None
    is_measured: bool  # every phase of it ran here


def strategy_costs(
    measured: Mapping[str, MeasuredPhase],
    generator: ModelSize | None,
    prompt_length: float,
    questions: int,
    labelled: int,
    backward_share: float = 1.0,
) -> list[StrategyCost]:
    """Every strategy's cost for one epoch over the training questions, evaluation and encoding the corpus apart.

    Args:
      measured: phases that ran, by name.
      generator: its size, for the share of a training step that is forward; None where none was loaded.
      prompt_length: mean tokens of a prompt.
      questions: training questions.
      labelled: those among them with labelled passages.
      backward_share: of the prompts that a generator is trained on, where the others are only read (and all are read
        once before: `ragjax.training.signals.drawn`).
    """
    parts = _seconds_per_question(measured, _forward_share(generator, prompt_length, backward_share), questions)
    return [
        StrategyCost(
            name,
            _total([_phase_seconds(phase, measured, parts, questions, labelled) for phase in phases]),
            all(phase.name in measured for phase in phases),
        )
        for name, phases in STRATEGIES.items()
        if phases
    ]


def _phase_seconds(
    phase: Phase,
    measured: Mapping[str, MeasuredPhase],
    parts: Mapping[str, float | None],
    questions: int,
    labelled: int,
) -> float | None:
    count = questions if phase.signal.reads_answers else labelled
    if phase.name in measured:
        found = measured[phase.name]
        # Passages that follow the embedder are encoded by steps, not by questions.
        whole, scoring = found.cost.total().seconds - found.cost.part("encode").seconds, 0.0
        if phase.signal.scores_once:
            scoring = found.cost.part("generator").seconds
        return (whole - scoring) / found.questions * count + scoring / min(found.questions, count) * count
    per_question = _total([parts[name] for name in phase.signal.cost_parts[phase.trains]])
    return None if per_question is None else per_question * count


def _forward_share(generator: ModelSize | None, prompt_length: float, backward_share: float) -> float:
    """FLOPs of reading prompts, as a share of those of a training step on them."""
    if generator is None:  # neither was measured
        return 1.0
    forward, train = (count(generator, [prompt_length], 0) for count in (forward_flops, train_flops))
    return forward / (train if backward_share == 1 else forward + backward_share * train)


def _seconds_per_question(
    measured: Mapping[str, MeasuredPhase], forward_share: float, questions: int
) -> dict[str, float | None]:
    """Seconds per question of each part of a step; where none was measured, by the ratio of FLOPs to one that was.

    forward_share: of a training step's FLOPs.
    """

    def seconds(part: str, *names: str, most: int | None = None) -> float | None:
        found = [measured[name] for name in names if name in measured]
        total = sum(min(phase.questions, most or phase.questions) for phase in found)
        return sum(phase.cost.part(part).seconds for phase in found) / total if total else None

    generator_train = seconds("generator", "generator", "joint")
    generator_forward = seconds("generator", "retriever", most=questions)
    embedder_train = seconds("embedder", "joint", "retriever", "embedder")
    embedder_forward = seconds("embedder", "generator")
    return {
        "generator_train": generator_train or _times(generator_forward, 1 / forward_share),
        "generator_forward": generator_forward or _times(generator_train, forward_share),
        # An embedder is trained by all its weights: twice as much backward as forward, on a question read twice.
        "embedder_train": embedder_train or _times(embedder_forward, 2.0),
        "embedder_forward": embedder_forward or _times(embedder_train, 0.5),
        "search": seconds("search", "generator", "joint", "retriever") or 0.0,
    }


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
