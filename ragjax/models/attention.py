"""Attention as two batched matrix products, with one mask rule for packed rows, padding and key-value caches."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from ragjax.arrays import AnyArray, Array
from ragjax.models.products import float32_matmul, matmul

# Finite, so that a row of padding (nothing to attend to) gives a finite output and finite gradients.
_MASKED = -1e30

# Queries that `causal_attention` takes at once, and how many blocks it is unrolled into at most.
_BLOCK = 128
_MOST_BLOCKS = 16


def attention_mask(
    query_segments: Int[AnyArray, "R S"],
    query_positions: Int[AnyArray, "R S"],
    key_segments: Int[AnyArray, "R C"],
    key_positions: Int[AnyArray, "R C"],
    causal: bool,
    window: int | None = None,
) -> Bool[AnyArray, "R S C"]:
    """Which keys a query may see: those of its own segment, and none that come later where `causal`.

    Args:
      query_segments, query_positions: of the queries; segment 0 is padding.
      key_segments, key_positions: of the keys.
      causal: whether position order matters.
      window: a causal query sees itself and the `window` - 1 tokens before it; None: all before it.
    """
    mask = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments[:, None, :] > 0)
    if causal:
        distance = query_positions[:, :, None] - key_positions[:, None, :]
        mask &= (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return mask


def dot_product_attention(
    queries: Float[Array, "R S N H"],
    keys: Float[Array, "R C M H"],
    values: Float[Array, "R C M H"],
    mask: Bool[AnyArray, "R S C"],
    bias: Float[Array, "N R S C"] | None = None,
) -> Float[Array, "R S N H"]:
    """softmax(q k^T / sqrt(H) + bias) v with grouped key-value heads; the softmax runs in float32.

    Two flat batched products over M * R: on CPU they beat `jax.nn.dot_product_attention` about twofold, and the N / M
    query heads of a group share their keys without repeating them. Heads come first, so that devices between which
    they are shared out need nothing of each other here.

    Args:
      queries, keys, values: N is a multiple of M.
      mask: true where a query sees a key.
      bias: added to the scores.

    Returns:
      In the dtype of `values`.
    """
    rows, length, heads, width = queries.shape
    slots, groups = keys.shape[1:3]
    per_group = heads // groups
    # [R, S, M, G, H] -> [M * R, G * S, H]
    queries = (queries * width**-0.5).reshape(rows, length, groups, per_group, width).transpose(2, 0, 3, 1, 4)
    queries = queries.reshape(groups * rows, per_group * length, width)
    keys = keys.transpose(2, 0, 3, 1).reshape(groups * rows, width, slots)
    values = values.transpose(2, 0, 1, 3).reshape(groups * rows, slots, width)
    scores = float32_matmul(queries, keys)
    scores = scores.reshape(groups, rows, per_group, length, slots) + jnp.where(mask, 0.0, _MASKED)[None, :, None]
    if bias is not None:
        scores += bias.reshape(groups, per_group, rows, length, slots).swapaxes(1, 2)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = matmul(probabilities.reshape(groups * rows, per_group * length, slots), values)
    mixed = mixed.reshape(groups, rows, per_group, length, width).transpose(1, 3, 0, 2, 4)
    return mixed.reshape(rows, length, heads, width)


def causal_attention(
    queries: Float[Array, "R S N H"],
    keys: Float[Array, "R S M H"],
    values: Float[Array, "R S M H"],
    mask: Bool[AnyArray, "R S S"],
    window: int | None = None,
) -> Float[Array, "R S N H"]:
    """`dot_product_attention` of tokens to themselves, where no token sees a later column.

    Blocks of queries meet only the keys from their first window to their own end, so half of the scores or more are
    never made, and a block's scores stay in the processor's cache: on CPU, rows of 704 tokens took a third of the
    time forward and half of it backward.

    Args:
      queries, keys, values: N is a multiple of M.
      mask: False above the diagonal.
      window: the mask is False where a key stands `window` or more columns before its query.

    Returns:
      In the dtype of `values`.
    """
    length = queries.shape[1]
    block = max(_BLOCK, -(-length // _MOST_BLOCKS))
    mixed = []
    for start in range(0, length, block):
        own = slice(start, min(start + block, length))
        seen = slice(0 if window is None else max(start - window + 1, 0), own.stop)
        mixed.append(dot_product_attention(queries[:, own], keys[:, seen], values[:, seen], mask[:, own, seen]))
    return jnp.concatenate(mixed, axis=1)


def cached_attention(
    queries: Float[Array, "R Q N H"],
    parts: Sequence[tuple[Float[Array, "R M H _"], Float[Array, "R M _ H"]]],
    mask: Bool[AnyArray, "R Q C"],
) -> Float[Array, "R Q N H"]:
    """`dot_product_attention` to keys and values that lie in several arrays, which are never joined or transposed.

    Args:
      queries: N is a multiple of M.
      parts: pairs of keys and values, of C keys together.
      mask: true where a query sees a key.

    Returns:
      In the dtype of the values.
    """
    rows, length, heads, width = queries.shape
    groups = parts[0][0].shape[1]
    # [R, Q, M, G, H] -> [R, M, G * Q, H]
    queries = (queries * width**-0.5).reshape(rows, length, groups, -1, width).transpose(0, 2, 3, 1, 4)
    queries = queries.reshape(rows, groups, -1, width)
    scores = jnp.concatenate([float32_matmul(queries, keys) for keys, _ in parts], axis=-1)
    scores = scores.reshape(rows, groups, -1, length, mask.shape[-1])
    scores += jnp.where(mask, 0.0, _MASKED)[:, None, None]
    probabilities = jax.nn.softmax(scores, axis=-1).reshape(rows, groups, -1, mask.shape[-1])
    shares, start = [], 0
    for _, values in parts:
        share = probabilities[..., start : start + values.shape[2]].astype(values.dtype)
        shares.append(matmul(share, values))
        start += values.shape[2]
    mixed = functools.reduce(jnp.add, shares).reshape(rows, groups, -1, length, width).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(rows, length, heads, width)
