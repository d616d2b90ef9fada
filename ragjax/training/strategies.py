"""Strategies as data: each is a tuple of phases."""

import dataclasses

from ragjax.config import RunConfig
from ragjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Phase:
    """One training run over the questions."""

    name: str
    trains: tuple[str, ...]  # of "embedder", "generator"
    live_retrieval: bool  # passages from the embedder as it is being trained, or from the baseline


STRATEGIES: dict[str, tuple[Phase, ...]] = {
    "none": (),
    "generator": (Phase("generator", trains=("generator",), live_retrieval=False),),
    "joint": (Phase("joint", trains=("embedder", "generator"), live_retrieval=True),),
}


def phases_of(config: RunConfig) -> tuple[Phase, ...]:
    """The phases of a configuration's strategy.

    Raises:
      UserError: the strategy is not built yet, or does not go with the objective.
    """
    phases = STRATEGIES.get(config.strategy)
    if phases is None:
        raise UserError(f"--strategy={config.strategy} is not built yet: choose one of {', '.join(STRATEGIES)}.")
    trains_generator = any("generator" in phase.trains for phase in phases)
    if config.quantize != "none" and not config.lora_rank and trains_generator:
        raise UserError(
            f"--quantize={config.quantize} freezes the generator's layers, so they cannot be trained as --lora_rank=0 "
            "asks: give --lora_rank a number above 0, or leave --quantize out."
        )
    if config.objective == "concat_nll" and any("embedder" in phase.trains for phase in phases):
        raise UserError(
            f"--objective=concat_nll gives the embedder no gradient, so it does not go with --strategy="
            f"{config.strategy}: choose --strategy=generator, or --objective=rag_token or rag_sequence."
        )
    return phases
