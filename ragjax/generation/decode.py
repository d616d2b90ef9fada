"""Greedy decoding with a key-value cache, batched and compiled whole."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ragjax.models.decoder import Decoder, init_cache

Array = jax.Array


@functools.partial(jax.jit, static_argnames=("module", "max_new_tokens", "end_ids"))
def greedy_decode(
    module: Decoder,
    variables: Mapping[str, Any],
    tokens: Array,
    lengths: Array,
    max_new_tokens: int,
    end_ids: tuple[int, ...],
) -> tuple[Array, Array]:
    """The likeliest next token until an end token or `max_new_tokens`; stops when every row has ended.

    Args:
      module: the decoder.
      variables: its collections.
      tokens: [R, S] int, prompts, right-padded.
      lengths: [R] int, tokens of each prompt; a filler row has 0 and ends at once.
      max_new_tokens: bound on new tokens.
      end_ids: tokens that end a row.

    Returns:
      (new tokens [R, max_new_tokens] int32, how many of them are text [R] int32, the end token not counted).
    """
    rows, prompt_length = tokens.shape
    slots = jnp.broadcast_to(jnp.arange(prompt_length), tokens.shape)
    cache = init_cache(module.config, rows, prompt_length + max_new_tokens)
    # Every row's new tokens go to the same slots behind the longest prompt; `positions` and `segment_ids`, not
    # slots, tell the model where a token stands, so a row's padding in between is never seen.
    hidden, cache = module.apply(variables, tokens, (slots < lengths[:, None]).astype(jnp.int32), slots, cache=cache)
    last = hidden[jnp.arange(rows), jnp.maximum(lengths - 1, 0)]
    ends = jnp.asarray(end_ids, jnp.int32)

    def next_token(state):
        logits = module.apply(variables, state, method="logits")
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def unfinished(carry):
        step, _, done, *_ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance(carry):
        step, token, done, output, counts, cache = carry
        output = output.at[:, step].set(jnp.where(done, 0, token))
        counts = counts + ~done
        hidden, cache = module.apply(
            variables,
            token[:, None],
            jnp.ones((rows, 1), jnp.int32),
            (lengths + step)[:, None],
            cache=cache,
        )
        following = next_token(hidden[:, 0])
        return step + 1, following, done | jnp.isin(following, ends), output, counts, cache

    first = next_token(last)
    done = (lengths == 0) | jnp.isin(first, ends)
    output = jnp.zeros((rows, max_new_tokens), jnp.int32)
    counts = jnp.zeros(rows, jnp.int32)
    _, _, _, output, counts, _ = jax.lax.while_loop(
        unfinished, advance, (jnp.int32(0), first, done, output, counts, cache)
    )
    return output, counts
