"""Products at one precision on every device, and logits whose sums are not rounded to bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.models.products import float32_matmul, matmul, weight_product
from tests.tiny_modules import tiny_decoder


def random(*shape: int, seed: int = 0, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def exact(x) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


@pytest.mark.parametrize("product", [matmul, float32_matmul])
def test_products_of_float32_are_float32(product):
    x, y = random(3, 5, 64, seed=1), random(3, 64, 7, seed=2)
    got = product(x, y)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact(x) @ exact(y), rtol=0, atol=1e-5)


def test_half_precision_factors_keep_their_dtype_or_their_sums():
    x, y = random(5, 512, seed=1, dtype="bfloat16"), random(512, 7, seed=2, dtype="bfloat16")
    expected = exact(x) @ exact(y)
    assert matmul(x, y).dtype == jnp.bfloat16
    wide = float32_matmul(x, y)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, expected, rtol=0, atol=1e-4)
    assert np.abs(exact(matmul(x, y)) - expected).max() > 1e-2, "the sums would not show rounding"


@pytest.mark.parametrize("shapes", [((2, 4, 8), (2, 8, 3)), ((2, 4, 8), (8, 3))], ids=["batched", "shared"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2.0**-7)])
def test_the_gradient_is_that_of_the_product(dtype, tolerance, shapes):
    """By hand: dL/dx = g y', dL/dy = x' g, summed over the batch that shares y; g rounded to the factors' dtype."""
    x, y = (random(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    weights = random(2, 4, 3, seed=5)
    to_x, to_y = jax.grad(lambda x, y: jnp.sum(float32_matmul(x, y) * weights), argnums=(0, 1))(x, y)
    assert (to_x.dtype, to_y.dtype) == (x.dtype, y.dtype)
    for_x = exact(weights) @ exact(y).swapaxes(-1, -2)
    for_y = exact(x).swapaxes(-1, -2) @ exact(weights)
    for_y = for_y if y.ndim == 3 else for_y.sum(0)
    for got, expected in ((to_x, for_x), (to_y, for_y)):
        assert np.linalg.norm(exact(got) - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("wide", [False, True])
def test_a_trained_weights_gradient_is_summed_in_float32(wide):
    """By hand: dL/dw = x' g, of factors in bfloat16 and not rounded itself."""
    x, w = random(2, 300, 8, seed=1, dtype="bfloat16"), random(8, 5, seed=2)
    weights = random(2, 300, 5, seed=3, dtype="bfloat16")
    product = weight_product(x, w, wide)
    plain = float32_matmul(x, w.astype(x.dtype)) if wide else matmul(x, w.astype(x.dtype))
    np.testing.assert_array_equal(product, plain)
    assert product.dtype == plain.dtype
    to_x, to_w = jax.grad(lambda x, w: jnp.sum(weight_product(x, w, wide) * weights), argnums=(0, 1))(x, w)
    assert (to_x.dtype, to_w.dtype) == (jnp.bfloat16, jnp.float32)
    expected = np.einsum("rsk,rsm->km", exact(x), exact(weights))
    assert np.linalg.norm(exact(to_w) - expected) <= 1e-6 * np.linalg.norm(expected)
    expected = exact(weights) @ exact(w.astype(x.dtype)).T
    assert np.linalg.norm(exact(to_x) - expected) <= 2.0**-7 * np.linalg.norm(expected)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_bfloat16_decoders_logits_are_not_rounded(is_tied):
    module, variables = tiny_decoder(3, dtype="bfloat16", tie_word_embeddings=is_tied)
    hidden = random(5, 16, seed=4, dtype="bfloat16") * 40
    params = variables["params"]
    kernel = params["embed_tokens"]["embedding"].T if is_tied else params["lm_head"]["kernel"]
    expected = exact(hidden) @ exact(jnp.asarray(kernel, jnp.bfloat16))
    got = module.apply(variables, hidden, method="logits")
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-4)
    assert np.abs(exact(got.astype(jnp.bfloat16)) - expected).max() > 1e-2, "the logits would not show rounding"
