"""The losses of retrieval-augmented generation: pure, unreduced, in natural log and float32.

Every loss returns one value per question, so that a caller can reduce with an explicit sum and count whatever the
number of devices or accumulation steps. A question whose mask is all false (a filler that pads the last batch) has
loss 0 and gives no gradient, whatever its other values are.

Lewis et al. 2020, "Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks", arXiv 2005.11401.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from ragjax.arrays import AnyArray, Array, Scalar


def doc_log_probs(
    question_vectors: Float[AnyArray, "B E"], passage_vectors: Float[AnyArray, "B K E"], scale: Scalar
) -> Float[Array, "B K"]:
    """Retrieval distribution over the K passages: log p(z|x) = log softmax_z(scale * <x, z>).

    Args:
      question_vectors: [B, E]. Not normalised here: unit vectors make the inner product the cosine.
      passage_vectors: [B, K, E].
      scale: multiplies the inner product before the softmax (an inverse temperature).

    Returns:
      [B, K] float32, log-probabilities that sum to one over K.
    """
    scores = jnp.einsum(
        "be,bke->bk",
        question_vectors.astype(jnp.float32),
        passage_vectors.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jax.nn.log_softmax(scale * scores, axis=-1)


def rag_token_nll(
    doc_log_probs: Float[AnyArray, "B K"],
    answer_log_probs: Float[AnyArray, "B K T"],
    answer_mask: Bool[AnyArray, "B T"],
) -> Float[Array, " B"]:
    """RAG-Token: -log prod_t sum_z p(z|x) p(y_t | x, z, y_<t): every token draws its own passage.

    Args:
      doc_log_probs: [B, K], log p(z|x).
      answer_log_probs: [B, K, T], log p(y_t | x, z, y_<t).
      answer_mask: [B, T] bool, true at answer tokens.

    Returns:
      [B] float32, Lewis et al. 2020, section 2.1.
    """
    docs, answers, mask = _masked_float32(doc_log_probs, answer_log_probs, answer_mask)
    token_log_probs = jax.nn.logsumexp(docs[:, :, None] + answers, axis=1)
    return -jnp.sum(jnp.where(mask, token_log_probs, 0.0), axis=-1)


def rag_sequence_nll(
    doc_log_probs: Float[AnyArray, "B K"],
    answer_log_probs: Float[AnyArray, "B K T"],
    answer_mask: Bool[AnyArray, "B T"],
) -> Float[Array, " B"]:
    """RAG-Sequence: -log sum_z p(z|x) prod_t p(y_t | x, z, y_<t): one passage explains the whole answer.

    Args:
      doc_log_probs: [B, K], log p(z|x).
      answer_log_probs: [B, K, T], log p(y_t | x, z, y_<t).
      answer_mask: [B, T] bool, true at answer tokens.

    Returns:
      [B] float32, Lewis et al. 2020, section 2.1.
    """
    docs, answers, mask = _masked_float32(doc_log_probs, answer_log_probs, answer_mask)
    nll = -jax.nn.logsumexp(docs + jnp.sum(answers, axis=-1), axis=-1)
    return jnp.where(jnp.any(mask, axis=-1), nll, 0.0)


def emdr2_nll(
    doc_log_probs: Float[AnyArray, "B K"],
    answer_log_probs: Float[AnyArray, "B K T"],
    answer_mask: Bool[AnyArray, "B T"],
    temperature: Scalar = 1.0,
) -> Float[Array, " B"]:
    """EMDR2's retriever loss: RAG-Sequence with the generator's likelihoods held constant.

    -log sum_z p(z|x) sg[p(y|x,z)^(1 / temperature)], where sg stops the gradient.

    Args:
      doc_log_probs: [B, K], log p(z|x).
      answer_log_probs: [B, K, T], log p(y_t | x, z, y_<t); no gradient reaches them.
      answer_mask: [B, T] bool, true at answer tokens.
      temperature: flattens the likelihoods where it is above 1; at 1 the value is `rag_sequence_nll`'s.

    Returns:
      [B] float32. Singh et al. 2021, arXiv 2106.05346, section 2.3.
    """
    docs, likelihoods, mask = _frozen_likelihoods(doc_log_probs, answer_log_probs, answer_mask)
    nll = -jax.nn.logsumexp(docs + likelihoods / temperature, axis=-1)
    return jnp.where(jnp.any(mask, axis=-1), nll, 0.0)


def perplexity_distillation_nll(
    doc_log_probs: Float[AnyArray, "B K"],
    answer_log_probs: Float[AnyArray, "B K T"],
    answer_mask: Bool[AnyArray, "B T"],
    temperature: Scalar = 1.0,
) -> Float[Array, " B"]:
    """Perplexity distillation: KL( sg[softmax_z(log p(y|x,z) / temperature)] || p(z|x) ).

    Args:
      doc_log_probs: [B, K], log p(z|x).
      answer_log_probs: [B, K, T], log p(y_t | x, z, y_<t); no gradient reaches them. They are summed over T.
      answer_mask: [B, T] bool, true at answer tokens.
      temperature: of the target distribution.

    Returns:
      [B] float32. Izacard et al. 2022 (Atlas), arXiv 2208.03299, section 2.2.
    """
    docs, likelihoods, mask = _frozen_likelihoods(doc_log_probs, answer_log_probs, answer_mask)
    target = jax.nn.log_softmax(likelihoods / temperature, axis=-1)
    return jnp.where(jnp.any(mask, axis=-1), _kl(target, docs), 0.0)


def replug_lsr_nll(
    doc_log_probs: Float[AnyArray, "B K"],
    answer_log_probs: Float[AnyArray, "B K T"],
    answer_mask: Bool[AnyArray, "B T"],
    temperature: Scalar = 1.0,
) -> Float[Array, " B"]:
    """REPLUG's LM-supervised retrieval: KL( p(z|x) || sg[softmax_z(p(y|x,z) / temperature)] ).

    The target is a softmax over probabilities, not over their logarithms, so it is never far from uniform at
    temperature 1.

    Args:
      doc_log_probs: [B, K], log p(z|x).
      answer_log_probs: [B, K, T], log p(y_t | x, z, y_<t); no gradient reaches them. They are summed over T.
      answer_mask: [B, T] bool, true at answer tokens.
      temperature: of the target distribution.

    Returns:
      [B] float32. Shi et al. 2023, arXiv 2301.12652, section 4.
    """
    docs, likelihoods, mask = _frozen_likelihoods(doc_log_probs, answer_log_probs, answer_mask)
    target = jax.nn.log_softmax(jnp.exp(likelihoods) / temperature, axis=-1)
    return jnp.where(jnp.any(mask, axis=-1), _kl(docs, target), 0.0)


def leave_one_out_nll(
    doc_log_probs: Float[AnyArray, "B K"],
    leave_one_out_log_probs: Float[AnyArray, "B K T"],
    answer_mask: Bool[AnyArray, "B T"],
    temperature: Scalar = 1.0,
) -> Float[Array, " B"]:
    """Leave-one-out distillation: KL( sg[softmax_z(-log p(y|x, all but z) / temperature)] || p(z|x) ).

    A passage counts by how much likelier the answer is with it among the others, so one that helps only together with
    another (the second hop of a question) counts too.

    Args:
      doc_log_probs: [B, K], log p(z|x).
      leave_one_out_log_probs: [B, K, T], log p(y_t | x, all passages but the k-th, y_<t); no gradient reaches them.
        They are summed over T.
      answer_mask: [B, T] bool, true at answer tokens.
      temperature: of the target distribution.

    Returns:
      [B] float32. Izacard et al. 2022 (Atlas), arXiv 2208.03299, section 2.2 (LOOP).
    """
    # Distillation, to which a passage is the better the less likely the answer is without it.
    return perplexity_distillation_nll(doc_log_probs, -jnp.asarray(leave_one_out_log_probs), answer_mask, temperature)


def multiple_negatives_ranking_nll(
    question_vectors: Float[AnyArray, "B E"],
    passage_vectors: Float[AnyArray, "P E"],
    scale: Scalar = 20.0,
    labels: Int[AnyArray, " B"] | None = None,
    candidate_mask: Bool[AnyArray, "B P"] | None = None,
) -> Float[Array, " B"]:
    """Multiple negatives ranking: -log softmax_p(scale * <x, p>) at the positive, over all candidates.

    Args:
      question_vectors: [B, E], unit length where the cosine is meant.
      passage_vectors: [P, E], the candidates of the whole batch, P >= B where `labels` is left out.
      scale: multiplies the inner product.
      labels: [B] int, the column of each question's positive; row i's is column i by default.
      candidate_mask: [B, P] bool, false where a candidate must not count as a negative (it is a positive too).
        The positive itself always counts.

    Returns:
      [B] float32. Henderson et al. 2017, arXiv 1705.00652, section 4.
    """
    logits = scale * jnp.matmul(
        question_vectors.astype(jnp.float32),
        passage_vectors.astype(jnp.float32).T,
        precision=jax.lax.Precision.HIGHEST,
    )
    rows = jnp.arange(logits.shape[0])
    labels = rows if labels is None else jnp.asarray(labels)
    if candidate_mask is not None:
        candidates = jnp.asarray(candidate_mask, bool).at[rows, labels].set(True)
        logits = jnp.where(candidates, logits, -jnp.inf)
    return jax.nn.logsumexp(logits, axis=-1) - logits[rows, labels]


def _frozen_likelihoods(
    doc_log_probs: Float[AnyArray, "B K"],
    answer_log_probs: Float[AnyArray, "B K T"],
    answer_mask: Bool[AnyArray, "B T"],
) -> tuple[Float[Array, "B K"], Float[Array, "B K"], Bool[Array, "B T"]]:
    """log p(z|x) [B, K], the constant log p(y|x,z) [B, K], and the mask [B, T]."""
    docs, answers, mask = _masked_float32(doc_log_probs, jax.lax.stop_gradient(answer_log_probs), answer_mask)
    return docs, jnp.sum(answers, axis=-1), mask


def _kl(log_p: Float[Array, "B K"], log_q: Float[Array, "B K"]) -> Float[Array, " B"]:
    """sum_z p (log p - log q) over the last axis; what has probability 0 under p adds nothing."""
    possible = log_p > -jnp.inf
    difference = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
    return jnp.sum(jnp.exp(log_p) * difference, axis=-1)


def _masked_float32(
    doc_log_probs: Float[AnyArray, "B K"],
    answer_log_probs: Float[AnyArray, "B K T"],
    answer_mask: Bool[AnyArray, "B T"],
) -> tuple[Float[Array, "B K"], Float[Array, "B K T"], Bool[Array, "B T"]]:
    """Float32 inputs with everything that the mask rules out replaced by 0.

    The replacement comes before any arithmetic: a `where` after it would still send NaN * 0 = NaN back through
    a padded position that holds -inf or NaN.
    """
    mask = jnp.asarray(answer_mask, bool)
    valid = jnp.any(mask, axis=-1)
    docs = jnp.where(valid[:, None], jnp.asarray(doc_log_probs, jnp.float32), 0.0)
    answers = jnp.where(mask[:, None, :], jnp.asarray(answer_log_probs, jnp.float32), 0.0)
    return docs, answers, mask
