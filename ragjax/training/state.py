"""The training state, its optimizer and its schedule."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float32, Int32

from ragjax.arrays import Array, Tree


class TrainState(NamedTuple):
    """What a step changes. `trainable` and `optimizer` have one entry per trained model.

    Learning rates are array leaves, so that states which differ in them alone can be stacked and `vmap`ped.
    """

    step: Int32[Array, ""]  # optimizer steps done
    trainable: Mapping[str, Tree]  # {"embedder" | "generator": {collection: parameters}}
    optimizer: dict[str, optax.OptState]
    learning_rates: dict[str, Float32[Array, ""]]  # the peaks


def make_optimizer(max_grad_norm: float, weight_decay: float) -> optax.GradientTransformation:
    """AdamW without its rate (Loshchilov and Hutter 2017, arXiv 1711.05101), after clipping by the model's norm."""
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.scale_by_adam(),
        optax.add_decayed_weights(weight_decay),
    )


def init_state(
    trainable: Mapping[str, Tree], learning_rates: Mapping[str, float], optimizer: optax.GradientTransformation
) -> TrainState:
    """Step 0 of training `trainable`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        optimizer={model: optimizer.init(tree) for model, tree in trainable.items()},
        learning_rates={model: jnp.float32(learning_rates[model]) for model in trainable},
    )


def apply_gradients(
    state: TrainState,
    gradients: Mapping[str, Tree],
    optimizer: optax.GradientTransformation,
    factor: Float32[Array, ""],
) -> TrainState:
    """One update: each model has its own clipping, moments and rate, times the schedule's `factor`."""
    trainable, optimizer_state = {}, {}
    for model, gradient in gradients.items():
        old = state.trainable[model]
        updates, optimizer_state[model] = optimizer.update(gradient, state.optimizer[model], old)
        rate = state.learning_rates[model] * factor
        trainable[model] = jax.tree.map(lambda weight, update, r=rate: weight - r * update, old, updates)
    return state._replace(step=state.step + 1, trainable=trainable, optimizer=optimizer_state)


def keep_finite(
    updated: TrainState, state: TrainState, figures: Iterable[Float32[Array, ""]]
) -> tuple[TrainState, Bool[Array, ""]]:
    """The updated state, or where not all figures are finite the one before it, with the step counted.

    `optax.apply_if_finite` would not do: it sees one model at a time, and after some updates takes what it gets.

    Args:
      figures: of the step, the norms of its gradients among them. A norm beyond float32 counts too: clipping by it
        would make zeros of a gradient.

    Returns:
      The state, and whether the update was skipped.
    """
    is_finite = jnp.all(jnp.isfinite(jnp.stack(list(figures))))
    before = state._replace(step=updated.step)
    return jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), updated, before), ~is_finite


def linear_schedule(step: Int32[Array, ""], total_steps: int, warmup_fraction: float) -> Float32[Array, ""]:
    """Share of the peak rate at a step: rises over the warm-up, then falls linearly to reach 0 after the last."""
    warmup = max(round(warmup_fraction * total_steps), 1)
    rise = (step + 1) / warmup
    fall = (total_steps - step) / max(total_steps - warmup + 1, 1)
    return jnp.minimum(1.0, jnp.minimum(rise, fall)).astype(jnp.float32)
