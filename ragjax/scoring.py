"""Answer log-probabilities under every passage: the vocabulary head only where an answer token is predicted."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int, Key

from ragjax.arrays import AnyArray, Array, Variables
from ragjax.data.batches import Rows
from ragjax.models.decoder import Decoder

# Rows of the head computed at once. [256, V] float32 logits take 50 MB at V = 49,152 and 131 MB at 128,256.
HEAD_ROWS = 256


def score_answers(
    module: Decoder, variables: Variables, rows: Rows, dropout_key: Key[Array, ""] | None = None
) -> Float32[Array, "B K T"]:
    """log p(y_t | x, z, y_<t) of every answer token under every passage.

    Only the hidden states that predict an answer token meet the vocabulary head, and the target is gathered from
    each chunk of logits at once, so [B, K, S, V] and [B, K, T, V] never exist.

    Args:
      module: the decoder.
      variables: its collections.
      rows: token rows, and where their answers stand.
      dropout_key: turns the adapter's dropout on.

    Returns:
      What `rows.answer_mask` rules out is meaningless.
    """
    decoder = module.bind(variables, rngs=None if dropout_key is None else {"dropout": dropout_key})
    dropout_ids = None if dropout_key is None else rows.dropout_ids
    hidden = decoder(rows.tokens, rows.segment_ids, rows.positions, dropout_ids)
    states = hidden[rows.answer_index[..., 0], rows.answer_index[..., 1]]
    targets = jnp.broadcast_to(rows.answer_tokens[:, None, :], states.shape[:3])
    log_probs = target_log_probs(module, variables, states.reshape(-1, states.shape[-1]), targets.reshape(-1))
    return log_probs.reshape(targets.shape)


def target_log_probs(
    module: Decoder, variables: Variables, states: Float[Array, "n D"], targets: Int[AnyArray, " n"]
) -> Float32[Array, " n"]:
    """log softmax(head(state)) at the target, in chunks whose logits the backward pass computes again."""

    def score(chunk: tuple[Float[Array, "rows D"], Int[AnyArray, " rows"]]) -> Float32[Array, " rows"]:
        chunk_states, chunk_targets = chunk
        logits = module.bind(variables).logits(chunk_states)
        gathered = jnp.take_along_axis(logits, chunk_targets[:, None], axis=-1)[:, 0]
        return gathered - jax.nn.logsumexp(logits, axis=-1)

    count = states.shape[0]
    if count <= HEAD_ROWS:
        return score((states, targets))
    padding = -count % HEAD_ROWS
    states = jnp.pad(states, ((0, padding), (0, 0))).reshape(-1, HEAD_ROWS, states.shape[-1])
    targets = jnp.pad(targets, (0, padding)).reshape(-1, HEAD_ROWS)
    return jax.lax.map(jax.checkpoint(score), (states, targets)).reshape(-1)[:count]
