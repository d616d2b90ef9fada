"""The training step: one pure function from (state, frozen, batch) to (state, metrics)."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float32, Key

from ragjax.arrays import Array, ModelVariables
from ragjax.parallel import Reducer
from ragjax.training.objectives import Losses, Objective
from ragjax.training.state import TrainState, apply_gradients, keep_finite, linear_schedule


def summed_loss(
    objective: Callable[..., Losses],
    trainable: ModelVariables,
    frozen: ModelVariables,
    batch: Any,
    key: Key[Array, ""] | None,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """Sum of the question losses (what is differentiated), with the sums and counts to reduce it by.

    objective: an `Objective`, or what a reducer's `each` has made of one.
    """
    found = objective(trainable, frozen, batch, key)
    sums = {name: jnp.sum(jnp.where(found.valid, values, 0.0)) for name, values in found.figures.items()}
    sums["loss"] = jnp.sum(found.loss)
    sums["questions"] = jnp.sum(found.valid, dtype=jnp.float32)
    if found.nll is not None and found.answer_tokens is not None:
        sums["nll"] = jnp.sum(found.nll)
        sums["answer_tokens"] = jnp.sum(found.answer_tokens, dtype=jnp.float32)
    return sums["loss"], jax.lax.stop_gradient(sums)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    total_steps: int,
    warmup_fraction: float,
    loss_reduction: str,
    seed: int,
) -> Callable[[Reducer], Callable[[TrainState, ModelVariables, Any], tuple[TrainState, dict[str, Array]]]]:
    """Builds the step for a `Reducer` (see `ragjax.parallel.Arrangement`).

    The batch's leaves carry a leading axis of micro-batches. Sums over them and over the groups come first; one
    division by the global number of questions (`sum`) or answer tokens (`mean`, where answers are scored) follows. So
    the result depends neither on the number of groups nor on how the questions are split. A step of which a figure
    is not finite, the norms of its gradients among them, changes nothing but the step's number, and is "skipped".
    """

    def for_reducer(reducer: Reducer):
        def step(state: TrainState, frozen: ModelVariables, batch: Any):
            key = jax.random.fold_in(jax.random.key(seed), state.step) if objective.dropout else None

            gradient_of = jax.grad(summed_loss, argnums=1, has_aux=True)

            def add_micro_batch(total, micro_batch):
                return jax.tree.map(jnp.add, total, gradient_of(*inputs(micro_batch))), None

            def inputs(micro_batch):
                return reducer.each(objective), state.trainable, frozen, micro_batch, key

            shapes = jax.eval_shape(lambda: gradient_of(*inputs(jax.tree.map(lambda leaf: leaf[0], batch))))
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            total, _ = jax.lax.scan(add_micro_batch, zeros, batch)
            gradients, sums = reducer.sum(total)
            per_token = loss_reduction == "mean" and "answer_tokens" in sums
            count = sums["answer_tokens" if per_token else "questions"]
            gradients = jax.tree.map(lambda gradient: gradient / count, gradients)
            factor = linear_schedule(state.step, total_steps, warmup_fraction)
            norms = {f"{model}_grad_norm": optax.tree.norm(tree) for model, tree in gradients.items()}
            figures = {**means(sums), "loss": sums["loss"] / count, **norms, "schedule": factor}
            updated = apply_gradients(state, gradients, optimizer, factor)
            state, skipped = keep_finite(updated, state, figures.values())
            return state, {**figures, "skipped": skipped.astype(jnp.float32)}

        return step

    return for_reducer


def make_eval_step(objective: Objective) -> Callable[[Reducer], Callable[..., dict[str, Array]]]:
    """Builds a step that only adds up: (trainable, frozen, batch) -> sums over micro-batches and groups."""

    def for_reducer(reducer: Reducer):
        def step(trainable: ModelVariables, frozen: ModelVariables, batch: Any):
            _, sums = jax.lax.scan(
                lambda _, micro_batch: (
                    None,
                    summed_loss(reducer.each(objective), trainable, frozen, micro_batch, None)[1],
                ),
                None,
                batch,
            )
            return reducer.sum(jax.tree.map(lambda values: jnp.sum(values, axis=0), sums))

        return step

    return for_reducer


def means(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Per-question figures of summed ones; where answers are scored, their loss per answer and per answer token."""
    totals = ("questions", "answer_tokens", "nll")
    figures = {name: value / sums["questions"] for name, value in sums.items() if name not in totals}
    if "nll" in sums:
        figures["nll_per_answer"] = sums["nll"] / sums["questions"]
        figures["nll_per_token"] = sums["nll"] / sums["answer_tokens"]
        figures["answer_tokens"] = sums["answer_tokens"]
    return {**figures, "questions": sums["questions"]}
