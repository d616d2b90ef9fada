"""What a phase minimises: the networks of a batch and the loss between them, one value per question.

Each objective is called as `objective(trainable, frozen, batch, key)` and returns `Losses`. Which parameters are
trained is the caller's choice: `trainable` and `frozen` together hold every model's collections.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float, Int, Key

from ragjax import losses
from ragjax.arrays import AnyArray, Array, ModelVariables, Tree
from ragjax.data.batches import Batch, DrawnBatch, RankingBatch, ScoredBatch
from ragjax.models.decoder import Decoder
from ragjax.models.encoders import sentence_vectors
from ragjax.scoring import score_answers

_NLL = {"rag_token": losses.rag_token_nll, "rag_sequence": losses.rag_sequence_nll}
_RETRIEVER_NLL = {
    "emdr2": losses.emdr2_nll,
    "pdist": losses.perplexity_distillation_nll,
    "replug_lsr": losses.replug_lsr_nll,
}


class Losses(NamedTuple):
    """Of the B questions of a batch; fillers are not valid and have loss 0."""

    loss: Float[Array, " B"]  # what is differentiated
    valid: Bool[Array, " B"]
    figures: dict[str, Float[Array, " B"]]  # to be averaged over the valid questions
    nll: Float[Array, " B"] | None = None  # the answers' negative log-likelihood, where answers are scored
    answer_tokens: Int[Array, " B"] | None = None  # with it


@dataclasses.dataclass(frozen=True)
class AnswerMixture:
    """-log p(answer) under the mixture of passages, and what moves the embedder by it."""

    name: str  # rag_token or rag_sequence
    score_scale: float
    retriever: str = "marginal"  # or emdr2, pdist, replug_lsr: the generator then keeps `name` as its own loss
    temperature: float = 1.0

    def __call__(
        self,
        vectors: Float[AnyArray, "B E"],
        passage_vectors: Float[AnyArray, "B K E"],
        answer_log_probs: Float[AnyArray, "B K T"],
        mask: Bool[AnyArray, "B T"],
    ) -> Losses:
        docs = losses.doc_log_probs(vectors, passage_vectors, self.score_scale)
        joint = docs + jnp.sum(jnp.where(mask[:, None], answer_log_probs, 0.0), axis=-1)
        figures = {"retrieval_entropy": _entropy(docs), "posterior_entropy": _entropy(jax.nn.log_softmax(joint))}
        if self.retriever == "marginal":
            loss = nll = _NLL[self.name](docs, answer_log_probs, mask)
        else:
            nll = _NLL[self.name](jax.lax.stop_gradient(docs), answer_log_probs, mask)
            figures["retriever_loss"] = _RETRIEVER_NLL[self.retriever](docs, answer_log_probs, mask, self.temperature)
            loss = nll + figures["retriever_loss"]
        return Losses(loss, jnp.any(mask, axis=-1), figures, nll, jnp.sum(mask, axis=-1))


@dataclasses.dataclass(frozen=True)
class AnswerObjective:
    """Both networks in the graph: joint training, or the generator's over a frozen embedder."""

    embedder: nn.Module
    generator: Decoder
    mixture: AnswerMixture
    dropout: bool = False

    def __call__(
        self, trainable: ModelVariables, frozen: ModelVariables, batch: Batch, key: Key[Array, ""] | None
    ) -> Losses:
        variables = merge(frozen, trainable)
        answer_log_probs = score_answers(self.generator, variables["generator"], batch.rows, dropout_key=key)
        vectors = _question_vectors(self.embedder, variables, batch)
        return self.mixture(vectors, batch.passage_vectors, answer_log_probs, batch.rows.answer_mask)


@dataclasses.dataclass(frozen=True)
class DrawnObjective:
    """`AnswerObjective` with a gradient through a few drawn passages of each question; without any, its value alone.

    The loss and the embedder's gradient are those of all passages, whose log-probs are numbers in the batch
    (`LikelihoodObjective`). The generator's gradient is that of all passages in expectation (`ragjax.training.draws`).
    """

    embedder: nn.Module
    generator: Decoder
    mixture: AnswerMixture
    dropout = False

    def __call__(
        self,
        trainable: ModelVariables,
        frozen: ModelVariables,
        batch: DrawnBatch | ScoredBatch,
        key: Key[Array, ""] | None,
    ) -> Losses:
        variables = merge(frozen, trainable)
        scored = batch.scored if isinstance(batch, DrawnBatch) else batch
        answer_log_probs = scored.answer_log_probs
        if isinstance(batch, DrawnBatch):
            own = score_answers(self.generator, variables["generator"], batch.rows)
            answer_log_probs = with_gradient_of(answer_log_probs, own, batch.drawn, batch.weights)
        vectors = _question_vectors(self.embedder, variables, scored)
        return self.mixture(vectors, scored.passage_vectors, answer_log_probs, scored.answer_mask)


def with_gradient_of(
    answer_log_probs: Float[AnyArray, "B K T"],
    drawn_log_probs: Float[Array, "B m T"],
    drawn: Int[AnyArray, "B m"],
    weights: Float[AnyArray, "B m"],
) -> Float[Array, "B K T"]:
    """The log-probs of all passages as they are, with the weighted gradients of the drawn ones' and no other.

    Whatever loss reads them has its own value, and its own gradient in expectation over the draw: it is linear in
    these gradients, and its derivatives by the log-probs do not depend on what is drawn.

    Args:
      answer_log_probs: of all passages, as numbers.
      drawn_log_probs: of the drawn ones, as functions of what is trained.
      drawn: their places among the K passages.
      weights: 1 / the probability that each had of being drawn.
    """
    nothing = drawn_log_probs - jax.lax.stop_gradient(drawn_log_probs)  # 0, with a gradient
    questions = jnp.arange(len(drawn))[:, None]
    return jnp.asarray(answer_log_probs).at[questions, drawn].add(weights[:, :, None] * nothing)


@dataclasses.dataclass(frozen=True)
class ConcatenatedObjective:
    """-log p(answer | all passages in one prompt), for the generator alone: the batch has K = 1 prompt a question."""

    generator: Decoder
    dropout: bool = False

    def __call__(
        self, trainable: ModelVariables, frozen: ModelVariables, batch: Batch, key: Key[Array, ""] | None
    ) -> Losses:
        variables = merge(frozen, trainable)["generator"]
        answer_log_probs = score_answers(self.generator, variables, batch.rows, dropout_key=key)
        mask = batch.rows.answer_mask
        nll = losses.rag_sequence_nll(jnp.zeros(answer_log_probs.shape[:2]), answer_log_probs, mask)
        return Losses(nll, jnp.any(mask, axis=-1), {}, nll, jnp.sum(mask, axis=-1))


@dataclasses.dataclass(frozen=True)
class LikelihoodObjective:
    """The embedder alone in the graph: the frozen generator's answer log-probs are numbers in the batch.

    By the posterior identity (the gradient of -log sum_k p_k q_k with respect to p needs q only as a constant) the
    embedder's gradient is that of the whole graph.
    """

    embedder: nn.Module
    mixture: AnswerMixture
    dropout = False

    def __call__(
        self, trainable: ModelVariables, frozen: ModelVariables, batch: ScoredBatch, key: Key[Array, ""] | None
    ) -> Losses:
        vectors = _question_vectors(self.embedder, merge(frozen, trainable), batch)
        return self.mixture(vectors, batch.passage_vectors, batch.answer_log_probs, batch.answer_mask)


@dataclasses.dataclass(frozen=True)
class LeaveOneOutObjective:
    """The embedder alone in the graph; the batch's answer log-probs are those without each passage."""

    embedder: nn.Module
    score_scale: float
    temperature: float = 1.0
    dropout = False

    def __call__(
        self, trainable: ModelVariables, frozen: ModelVariables, batch: ScoredBatch, key: Key[Array, ""] | None
    ) -> Losses:
        vectors = _question_vectors(self.embedder, merge(frozen, trainable), batch)
        docs = losses.doc_log_probs(vectors, batch.passage_vectors, self.score_scale)
        loss = losses.leave_one_out_nll(docs, batch.answer_log_probs, batch.answer_mask, self.temperature)
        return Losses(loss, jnp.any(batch.answer_mask, axis=-1), {"retrieval_entropy": _entropy(docs)})


@dataclasses.dataclass(frozen=True)
class RankingObjective:
    """Multiple negatives ranking of the question's positive among the whole step's frozen passage vectors."""

    embedder: nn.Module
    scale: float
    dropout = False

    def __call__(
        self, trainable: ModelVariables, frozen: ModelVariables, batch: RankingBatch, key: Key[Array, ""] | None
    ) -> Losses:
        vectors = _question_vectors(self.embedder, merge(frozen, trainable), batch)
        nll = losses.multiple_negatives_ranking_nll(
            vectors, batch.candidate_vectors, self.scale, batch.labels, batch.candidate_mask
        )
        valid = jnp.asarray(batch.question_lengths) > 0
        return Losses(jnp.where(valid, nll, 0.0), valid, {})


Objective = (
    AnswerObjective
    | ConcatenatedObjective
    | DrawnObjective
    | LeaveOneOutObjective
    | LikelihoodObjective
    | RankingObjective
)


def merge(frozen: ModelVariables, trainable: ModelVariables) -> dict[str, dict[str, Tree]]:
    """Each model's variables, whichever of its collections are trained."""
    models = {*frozen, *trainable}
    return {model: {**frozen.get(model, {}), **trainable.get(model, {})} for model in models}


def _question_vectors(
    embedder: nn.Module, variables: ModelVariables, batch: Batch | ScoredBatch | RankingBatch
) -> Float[Array, "B E"]:
    return sentence_vectors(embedder, variables["embedder"], batch.question_tokens, batch.question_lengths)


def _entropy(log_probs: Float[Array, "B K"]) -> Float[Array, " B"]:
    """In nats."""
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
