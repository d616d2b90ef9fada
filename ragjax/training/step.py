"""The training step: one pure function from (state, frozen, batch) to (state, metrics)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from ragjax import losses
from ragjax.data.batches import Batch
from ragjax.models.decoder import Decoder
from ragjax.models.encoders import sentence_vectors
from ragjax.parallel import Reducer
from ragjax.scoring import score_answers
from ragjax.training.state import TrainState, apply_gradients, linear_schedule

Array = jax.Array
Tree = Mapping[str, Any]

_NLL = {"rag_token": losses.rag_token_nll, "rag_sequence": losses.rag_sequence_nll}


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: the networks and the loss between them."""

    embedder: nn.Module
    generator: Decoder
    name: str  # rag_token, rag_sequence, or concat_nll (K = 1 prompt with all passages)
    score_scale: float
    dropout: bool = False


def merge(frozen: Mapping[str, Tree], trainable: Mapping[str, Tree]) -> dict[str, dict[str, Tree]]:
    """Each model's variables, whichever of its collections are trained."""
    models = {*frozen, *trainable}
    return {model: {**frozen.get(model, {}), **trainable.get(model, {})} for model in models}


def question_nlls(
    objective: Objective, trainable: Tree, frozen: Tree, batch: Batch, key: Array | None
) -> tuple[Array, dict[str, Array]]:
    """The loss of each question [B], and figures about it [B]."""
    variables = merge(frozen, trainable)
    answer_log_probs = score_answers(objective.generator, variables["generator"], batch.rows, dropout_key=key)
    mask = batch.rows.answer_mask
    if objective.name == "concat_nll":
        certain = jnp.zeros(answer_log_probs.shape[:2])
        return losses.rag_sequence_nll(certain, answer_log_probs, mask), {}
    vectors = sentence_vectors(objective.embedder, variables["embedder"], batch.question_tokens, batch.question_lengths)
    docs = losses.doc_log_probs(vectors, batch.passage_vectors, objective.score_scale)
    joint = docs + jnp.sum(jnp.where(mask[:, None], answer_log_probs, 0.0), axis=-1)
    figures = {"retrieval_entropy": _entropy(docs), "posterior_entropy": _entropy(jax.nn.log_softmax(joint))}
    return _NLL[objective.name](docs, answer_log_probs, mask), figures


def summed_loss(
    objective: Objective, trainable: Tree, frozen: Tree, batch: Batch, key: Array | None
) -> tuple[Array, dict[str, Array]]:
    """Sum of the question losses (what is differentiated), with the sums and counts to reduce it by."""
    nlls, figures = question_nlls(objective, trainable, frozen, batch, key)
    valid = jnp.any(batch.rows.answer_mask, axis=-1)
    sums = {name: jnp.sum(jnp.where(valid, values, 0.0)) for name, values in figures.items()}
    sums["nll"] = jnp.sum(nlls)
    sums["questions"] = jnp.sum(valid, dtype=jnp.float32)
    sums["answer_tokens"] = jnp.sum(batch.rows.answer_mask, dtype=jnp.float32)
    return sums["nll"], jax.lax.stop_gradient(sums)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    total_steps: int,
    warmup_fraction: float,
    loss_reduction: str,
    seed: int,
) -> Callable[[Reducer], Callable[[TrainState, Tree, Batch], tuple[TrainState, dict[str, Array]]]]:
    """Builds the step for a `Reducer` (see `ragjax.parallel.pmap_step`).

    The batch's leaves carry a leading axis of micro-batches. Sums over them and over the devices come first; one
    division by the global number of questions (`sum`) or answer tokens (`mean`) follows. So the result depends
    neither on the number of devices nor on how the questions are split.
    """

    def for_reducer(reducer: Reducer):
        def step(state: TrainState, frozen: Tree, batch: Batch):
            key = jax.random.fold_in(jax.random.key(seed), state.step) if objective.dropout else None

            gradient_of = jax.grad(summed_loss, argnums=1, has_aux=True)

            def add_micro_batch(total, micro_batch):
                return jax.tree.map(jnp.add, total, gradient_of(*inputs(micro_batch))), None

            def inputs(micro_batch):
                return objective, state.trainable, frozen, micro_batch, key

            shapes = jax.eval_shape(lambda: gradient_of(*inputs(jax.tree.map(lambda leaf: leaf[0], batch))))
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            total, _ = jax.lax.scan(add_micro_batch, zeros, batch)
            gradients, sums = reducer.sum(total)
            count = sums["answer_tokens" if loss_reduction == "mean" else "questions"]
            gradients = jax.tree.map(lambda gradient: gradient / count, gradients)
            factor = linear_schedule(state.step, total_steps, warmup_fraction)
            norms = {f"{model}_grad_norm": optax.tree.norm(tree) for model, tree in gradients.items()}
            state = apply_gradients(state, gradients, optimizer, factor)
            return state, {"loss": sums["nll"] / count, **means(sums), **norms, "schedule": factor}

        return step

    return for_reducer


def make_eval_step(objective: Objective) -> Callable[[Reducer], Callable[..., tuple[None, dict[str, Array]]]]:
    """Builds a step that only adds up: (trainable, frozen, batch) -> sums over micro-batches and devices."""

    def for_reducer(reducer: Reducer):
        def step(trainable: Tree, frozen: Tree, batch: Batch):
            _, sums = jax.lax.scan(
                lambda _, micro_batch: (
                    None,
                    summed_loss(objective, trainable, frozen, micro_batch, None)[1],
                ),
                None,
                batch,
            )
            return reducer.sum(jax.tree.map(lambda values: jnp.sum(values, axis=0), sums))

        return step

    return for_reducer


def means(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Per-question figures of summed ones, with the loss per answer and per answer token."""
    counts = ("questions", "answer_tokens")
    figures = {name: value / sums["questions"] for name, value in sums.items() if name not in (*counts, "nll")}
    return {
        "nll_per_answer": sums["nll"] / sums["questions"],
        "nll_per_token": sums["nll"] / sums["answer_tokens"],
        **figures,
        **{name: sums[name] for name in counts},
    }


def _entropy(log_probs: Array) -> Array:
    """Entropy in nats over the last axis."""
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
