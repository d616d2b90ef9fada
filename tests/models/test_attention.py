"""Attention in blocks against the sum written out in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.models import attention


def reference(queries, keys, values, mask):
    """One query and head at a time."""
    rows, length, heads, width = queries.shape
    per_group = heads // keys.shape[2]
    mixed = np.zeros(queries.shape)
    for r, s, n in np.ndindex(rows, length, heads):
        seen = np.flatnonzero(mask[r, s])
        if len(seen):
            scores = keys[r, seen, n // per_group] @ queries[r, s, n] / np.sqrt(width)
            shares = np.exp(scores - scores.max())
            mixed[r, s, n] = shares / shares.sum() @ values[r, seen, n // per_group]
    return mixed


@pytest.mark.parametrize(("length", "window"), [(1, None), (5, 3), (8, None), (8, 1), (9, 11), (37, None), (37, 11)])
def test_blocks_equal_the_plain_sum(length, window, monkeypatch):
    """One block, whole blocks, a shorter last one, and blocks widened to keep to the most there may be."""
    monkeypatch.setattr(attention, "_BLOCK", 4)
    monkeypatch.setattr(attention, "_MOST_BLOCKS", 5)
    rng = np.random.default_rng(length)
    queries, weights = rng.normal(size=(2, 2, length, 4, 6))
    keys, values = rng.normal(size=(2, 2, length, 2, 6))
    # Two texts packed into the first row, one with padding behind it in the second.
    segments = np.ones((2, length), np.int32)
    segments[0, length // 2 :] = 2
    segments[1, length - length // 3 :] = 0
    positions = np.arange(length) + np.zeros((2, 1), np.int32)
    mask = np.asarray(attention.attention_mask(segments, positions, segments, positions, True, window))
    assert window is None or mask.sum(-1).max() <= window
    expected = reference(queries, keys, values, mask)
    arrays = [jnp.asarray(a, jnp.float32) for a in (queries, keys, values)]
    seen = segments > 0
    shares = jnp.asarray(weights * seen[..., None, None], jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def outcome(of, arrays):
        """The mixture, and the gradient of its weighted sum."""

        def weighted(*arrays):
            mixed = of(*arrays, mask)
            return jnp.sum(mixed * shares), mixed

        (_, mixed), gradients = jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True)(*arrays)
        return mixed, gradients

    mixed, gradients = outcome(functools.partial(attention.causal_attention, window=window), arrays)
    np.testing.assert_allclose(np.asarray(mixed)[seen], expected[seen], atol=2e-6)
    _, plain = outcome(attention.dot_product_attention, arrays)
    for gradient, other in zip(gradients, plain, strict=True):
        np.testing.assert_allclose(gradient, other, atol=5e-6)
