"""A phase's training step, compiled for shapes alone, and what it takes of each device.

Notable choices
- What lies on a device (weights, optimizer, batch) is added up from shapes and how the arrangement would place them;
  what a step needs besides is XLA's own plan for the compiled program.
- Both of a phase's programs count, where a generator scores answers before the step: the larger plan decides.
- The untrained weights of what is trained stay beside the state: a search of passages and the table before need them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from ragjax.arrays import ModelVariables
from ragjax.config import RunConfig
from ragjax.data.batches import Shape
from ragjax.dry_run.batches import largest_batch, scored_rows
from ragjax.dry_run.collectives import Sent, collectives_of
from ragjax.dry_run.lengths import Lengths
from ragjax.dry_run.shapes import ShapedModels
from ragjax.models.lora import COLLECTION
from ragjax.parallel import Arrangement, Layout
from ragjax.scoring import score_answers
from ragjax.training.loop import make_step, split_trainable
from ragjax.training.signals import model_work
from ragjax.training.signals.prompt_side import PromptLengths
from ragjax.training.state import TrainState, init_state
from ragjax.training.strategies import Phase

# How well LLVM optimises a CPU's code changes no plan of memory, and is most of the time that compiling takes.
_QUICK: dict[str, str | bool] = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
# Where a CPU stands for accelerators: it has hardly any operation on bfloat16, and would make float32 of all that the
# layers have kept before the loop that reads it, instead of layer by layer. With --remat=partial that tripled the plan.
_AS_ACCELERATORS: dict[str, str | bool] = _QUICK | {
    "xla_allow_excess_precision": False,
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion",
}


@dataclasses.dataclass(frozen=True)
class Held:
    """What lies on each device while a phase is trained, in bytes."""

    parameters: int  # of both models, adapters left out
    adapters: int
    optimizer: int
    untrained: int  # of what is trained, as it was before
    batch: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a phase takes of each device."""

    held: Held
    activations: int  # bytes, with all other temporaries
    collectives: Mapping[str, Sent]
    flops: float  # of a step, on all devices together
    layout: Layout
    shape: Shape | None  # of the generator's rows in each micro-batch

    @property
    def total(self) -> int:
        """Bytes."""
        return self.held.total + self.activations


class PlannedStep:
    """A phase's step with its arguments as shapes."""

    def __init__(self, phase: Phase, models: ShapedModels, lengths: Lengths, arrangement: Arrangement):
        config = models.config
        self._phase, self._models, self._lengths, self._arrangement = phase, models, lengths, arrangement
        objective = phase.signal.make_objective(models, phase.trains)
        optimizer, self._step = make_step(config, objective, steps=1)
        trainable, self._frozen = split_trainable(models, phase)
        rates = phase.learning_rates(config)
        self._state: TrainState = jax.eval_shape(lambda tree: init_state(tree, rates, optimizer), trainable)
        layout = arrangement.layout(phase.batch_size(config), config.gradient_accumulation)
        self._batch, self.layout, self.shape = largest_batch(
            objective, models, layout, lengths.question, lengths.prompts
        )

    @property
    def held(self) -> Held:
        """Nothing is compiled for it."""
        bytes_of, state = self._arrangement.bytes_of, self._state
        parameters, adapters = (
            sum(bytes_of(_collections(tree, are_adapters)) for tree in (self._frozen, state.trainable))
            for are_adapters in (False, True)
        )
        batch = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._batch)) // self.layout.groups
        counters = state._replace(trainable={})
        return Held(parameters, adapters, bytes_of(counters), bytes_of(state.trainable), batch)

    def needs(self, stands_in: bool = False) -> Needs:
        """Compiles the step.

        stands_in: the CPU devices here stand for accelerators.
        """
        lowered = self._arrangement.lower_step(self._step, self._state, self._frozen, self._batch)
        compiled = _compiled(lowered, stands_in)
        plans = [_planned_bytes(compiled)]
        if self._scores_before:
            plans.append(_planned_bytes(_compiled(self._lowered_scorer(), stands_in)))
        collectives = collectives_of(compiled.as_text() or "")
        return Needs(self.held, max(plans), collectives, self._flops(), self.layout, self.shape)

    @property
    def _scores_before(self) -> bool:
        """Whether the generator reads prompts, forward only, before the step is made."""
        signal, config = self._phase.signal, self._models.config
        return signal.reads_answers and ("generator" not in self._phase.trains or config.backward_passages > 0)

    @property
    def _prompts(self) -> PromptLengths:
        assert self._lengths.prompts is not None  # a phase that reads answers has them
        return self._lengths.prompts

    def _lowered_scorer(self) -> jax.stages.Lowered:
        module = self._models.generator.module
        rows = scored_rows(self._arrangement.groups, self._prompts.limits())
        placed = self._models.variables["generator"]
        return self._arrangement.lower_map(lambda variables, x: score_answers(module, variables, x)[:, 0], placed, rows)

    def _flops(self) -> float:
        """By the formulas of costs, with questions at their padded length and prompts at their mean."""
        phase, models, lengths = self._phase, self._models, self._lengths
        questions = phase.batch_size(models.config)
        embedder = model_work(models.embedder.size, [lengths.question], 0, "embedder" in phase.trains).flops
        return questions * (embedder + (self._generator_flops(models.config) if lengths.prompts else 0.0))

    def _generator_flops(self, config: RunConfig) -> float:
        """Of a question."""
        size, sample = self._models.generator.size, self._prompts.sample

        def work(share: float, training: bool) -> float:
            costs = [model_work(size, q.prompts, q.answer * len(q.prompts), training).flops for q in sample]
            return share * sum(costs) / len(costs)

        if not self._scores_before:
            return work(1.0, training=True)
        backward = config.backward_passages / config.top_k if "generator" in self._phase.trains else 0.0
        return work(1.0, training=False) + (work(backward, training=True) if backward else 0.0)


def _collections(variables: ModelVariables, are_adapters: bool) -> dict[str, dict[str, Any]]:
    return {
        model: {name: tree for name, tree in collections.items() if (name == COLLECTION) == are_adapters}
        for model, collections in variables.items()
    }


def _compiled(lowered: jax.stages.Lowered, stands_in: bool) -> jax.stages.Compiled:
    on_cpu = jax.default_backend() == "cpu"
    return lowered.compile(compiler_options=(_AS_ACCELERATORS if stands_in else _QUICK) if on_cpu else None)


def _planned_bytes(compiled: jax.stages.Compiled) -> int:
    """What the program needs besides its arguments: results that take over an argument's memory need none."""
    plan = compiled.memory_analysis()
    assert plan is not None  # of every platform that trains
    return int(plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes)
