"""Strategies as data: each is a tuple of phases, and a phase says what is trained, and from what."""

import dataclasses
from collections.abc import Mapping, Sequence

from ragjax.config import RunConfig, Strategy
from ragjax.data.questions import Question
from ragjax.errors import UserError
from ragjax.fields import Checked
from ragjax.training.signals import ANSWERS, LIKELIHOODS, POSITIVES, Signal

# What every phase reads, and nothing else does.
_TRAINING = (
    "gradient_accumulation",
    "epochs",
    "max_steps",
    "warmup_fraction",
    "weight_decay",
    "max_grad_norm",
    "keep",
    "dev_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_nonfinite_steps",
)
# The same of what trains a model.
_MODEL = {
    "embedder": ("embedder_lr", "embedder_rates"),
    "generator": ("generator_lr", "generator_rates", "lora_dropout", "backward_passages"),
}


@dataclasses.dataclass(frozen=True)
class Phase:
    """One training run over the questions, from the untrained models or from what earlier phases made of them."""

    name: str  # of its checkpoints, and in metrics.jsonl
    trains: tuple[str, ...]  # of "embedder", "generator"
    signal: Signal  # what is learnt from
    rates: Mapping[str, float]  # peak learning rate of each trained model where no flag sets it: see docs/defaults.md

    def learning_rates(self, config: RunConfig) -> dict[str, float]:
        """Peak rate of each trained model."""
        given = {"embedder": config.embedder_lr, "generator": config.generator_lr}
        return {model: self.rates[model] if (rate := given[model]) is None else rate for model in self.trains}

    def batch_size(self, config: RunConfig) -> int:
        """Questions per step."""
        return getattr(config, self.signal.batch_size_flag)

    @property
    def flags(self) -> set[str]:
        """Fields of RunConfig and SearchConfig that it reads, of those that nothing but phases read."""
        own = {flag for model in self.trains for flag in _MODEL[model]}
        retriever = {"retriever_objective", "retriever_temperature"} if _needs_marginal(self) else set()
        return {*_TRAINING, self.signal.batch_size_flag, *self.signal.flags, *own, *retriever}


_RANKING = Phase("embedder", ("embedder",), POSITIVES, {"embedder": 2e-5})
# Never gold passages: the generator has to cope with what retrieval finds (Lawton et al. 2025, section 3).
_GENERATOR = Phase("generator", ("generator",), ANSWERS, {"generator": 2e-4})
_RETRIEVER = Phase("retriever", ("embedder",), LIKELIHOODS, {"embedder": 3e-5})
_JOINT = Phase("joint", ("embedder", "generator"), ANSWERS, {"embedder": 1e-6, "generator": 2e-4})

STRATEGIES: dict[str, tuple[Phase, ...]] = {
    Strategy.NONE: (),
    Strategy.EMBEDDER: (_RANKING,),
    Strategy.GENERATOR: (_GENERATOR,),
    Strategy.INDEPENDENT: (_RANKING, _GENERATOR),
    Strategy.TWO_PHASE: (_GENERATOR, _RETRIEVER),
    Strategy.JOINT: (_JOINT,),
}


def choose_strategy(config: RunConfig, questions: Sequence[Question]) -> tuple[str, str]:
    """What --strategy=auto picks for these training questions, and why: the advice of Lawton et al. 2025, section 6."""
    labelled = sum(bool(question.positive_ids) for question in questions)
    share = f"{labelled} of {len(questions)} training questions have labelled passages"
    if 2 * labelled >= len(questions):
        return "independent", f"{share}: each model can be tuned alone, at the lowest cost"
    if config.embedder_lr is not None and config.generator_lr is not None:
        return "joint", f"{share}, and both learning rates are given"
    return "two_phase", f"{share}, and the learning rates are open: each can be searched by itself"


def phases_of(config: RunConfig) -> tuple[Phase, ...]:
    """The phases of a configuration's strategy (not auto: see `choose_strategy`).

    Raises:
      UserError: a flag does not go with the strategy.
    """
    phases = STRATEGIES[config.strategy]
    trains_generator = any("generator" in phase.trains for phase in phases)
    if config.quantize != "none" and not config.lora_rank and trains_generator:
        raise UserError(
            f"--quantize={config.quantize} freezes the generator's layers, so they cannot be trained as --lora_rank=0 "
            "asks: give --lora_rank a number above 0, or leave --quantize out."
        )
    if config.objective == "concat_nll" and any(_needs_marginal(phase) for phase in phases):
        raise UserError(
            f"--objective=concat_nll gives the embedder no gradient, so it does not go with --strategy="
            f"{config.strategy}: choose --strategy=generator or independent, or --objective=rag_token or rag_sequence."
        )
    if config.backward_passages and trains_generator:
        _refuse_backward_passages(config)
    if config.retriever_objective != "marginal" and not any(_needs_marginal(phase) for phase in phases):
        raise UserError(
            f"--retriever_objective={config.retriever_objective} moves the embedder by the answers' likelihood, which "
            f"--strategy={config.strategy} does not do: choose --strategy=joint or two_phase, or leave it out."
        )
    if config.retriever_objective == "loop":
        if any(_needs_marginal(phase) and "generator" in phase.trains for phase in phases):
            raise UserError(
                f"--retriever_objective=loop needs a frozen generator, and --strategy={config.strategy} trains both "
                "models together: choose --strategy=two_phase, or another objective."
            )
        if config.top_k < 2:
            raise UserError("--retriever_objective=loop leaves out one passage of several: give --top_k at least 2.")
    check_refreshing(config, phases)
    for flag, phase in (("embedder_run", _RANKING), ("generator_run", _GENERATOR)):
        if getattr(config, flag) and (phase not in phases or len(phases) == 1):
            fitting = [name for name, those in STRATEGIES.items() if phase in those and len(those) > 1]
            raise UserError(
                f"--{flag} takes over a model that --strategy={config.strategy} does not combine with another: choose "
                f"--strategy={' or '.join(fitting)}, or leave it out."
            )
    return phases


def _refuse_backward_passages(config: RunConfig) -> None:
    """Raises UserError where passages cannot be drawn, or where none would be left out."""
    given = f"--backward_passages={config.backward_passages}"
    if config.objective == "concat_nll":
        raise UserError(
            f"{given} draws among passages that are read one by one, and --objective=concat_nll reads them in one "
            "prompt: leave it out, or choose --objective=rag_token or rag_sequence."
        )
    if config.backward_passages >= config.top_k:
        raise UserError(
            f"{given} leaves out none of --top_k={config.top_k} passages: give a smaller number, or leave it out for "
            "the exact gradient."
        )
    if config.lora_dropout:
        raise UserError(
            f"{given} draws by likelihoods without dropout, which are not those of --lora_dropout="
            f"{config.lora_dropout:g}: leave one of the two out."
        )


def check_refreshing(config: RunConfig, phases: Sequence[Phase]) -> None:
    """Raises UserError where --refresh_passages has no embedder to follow, or a search that cannot follow it."""
    if not config.refresh_passages:
        return
    given = f"--refresh_passages={config.refresh_passages}"
    if not any("embedder" in phase.trains for phase in phases):
        fitting = [name for name, those in STRATEGIES.items() if any("embedder" in phase.trains for phase in those)]
        raise UserError(
            f"{given} follows an embedder that moves, and --strategy={config.strategy} trains none: choose --strategy="
            f"{', '.join(fitting[:-1])} or {fitting[-1]}, or leave it out."
        )
    if other := config.beyond_one_exact_search:
        raise UserError(f"{given} is for one search of all vectors on the host, and {other} is not: leave one out.")


def unread_flags(config: Checked, phases: Sequence[Phase]) -> list[str]:
    """Flags that are given other values than their defaults though none of these phases, only others, read them."""
    of_phases = {flag for those in STRATEGIES.values() for phase in those for flag in phase.flags}
    unread = of_phases.difference(*(phase.flags for phase in phases))
    return [
        f"--{field.name}"
        for field in dataclasses.fields(config)
        if field.name in unread and getattr(config, field.name) != field.default
    ]


def needs_generator(phases: Sequence[Phase], answers: bool) -> bool:
    """Whether a run with these phases loads a generator. answers: questions are answered besides."""
    return answers or any(phase.signal.reads_answers for phase in phases)


def _needs_marginal(phase: Phase) -> bool:
    """Whether the embedder learns from the answers."""
    return "embedder" in phase.trains and phase.signal.reads_answers
