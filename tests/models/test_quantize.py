"""Quantised kernels against the definition worked out with plain loops, and their products against dequantised ones."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.models.quantize import BLOCK, NF4_LEVELS, dequantize, quantize, quantized_matmul


def kernel_of(inputs, outputs, seed=0):
    return np.random.default_rng(seed).normal(size=(inputs, outputs)).astype(np.float32)


def test_levels_are_quantiles_of_the_normal_distribution():
    """QLoRA, section 3 and appendix E: halves of 8 and 9 quantiles that share the zero, scaled to [-1, 1].

    The outermost quantile is the mean of 1 - 1/32 and 1 - 1/30, the centres of the outermost of 16 and 15 bins.
    """
    outermost = (31 / 32 + 29 / 30) / 2
    normal = NormalDist()
    above = [normal.inv_cdf(q) for q in np.linspace(outermost, 0.5, 9)[:-1]]
    below = [-normal.inv_cdf(q) for q in np.linspace(outermost, 0.5, 8)[:-1]]
    levels = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(NF4_LEVELS, levels / levels.max(), atol=5e-7)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("inputs", [BLOCK, 2 * BLOCK, 16, BLOCK + 7, 1])
def test_every_number_is_rounded_to_the_nearest_level_of_its_block(kind, inputs):
    kernel = kernel_of(inputs, 3, seed=inputs)
    kernel[:, 1] *= 1e-3
    levels = np.array(NF4_LEVELS) if kind == "nf4" else np.arange(-127, 128) / 127
    found = np.asarray(dequantize(quantize(jnp.asarray(kernel), kind), inputs))
    for column in range(3):
        for start in range(0, inputs, BLOCK):
            block = kernel[start : start + BLOCK, column].astype(np.float64)
            absmax = np.abs(block).max()
            for number, got in zip(block, found[start : start + BLOCK, column], strict=True):
                nearest = absmax * levels[np.argmin(np.abs(levels - number / absmax))]
                assert abs(got - nearest) < 1e-6 * absmax


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_what_is_on_a_level_comes_back(kind):
    """All sixteen levels and both signs of the largest, and a block of zeros."""
    levels = np.array(NF4_LEVELS, np.float32) if kind == "nf4" else np.linspace(-127, 127, 255, dtype=np.float32) / 127
    kernel = np.zeros((3 * BLOCK, 2), np.float32)
    kernel[: min(BLOCK, len(levels)), 0] = levels[:BLOCK]
    kernel[0, 0] = -1.0
    kernel[BLOCK : 2 * BLOCK, 1] = np.resize(levels[::-1], BLOCK) * 4.0
    quantized = quantize(jnp.asarray(kernel), kind)
    # 127ths are rounded once more in float32.
    np.testing.assert_allclose(dequantize(quantized, 3 * BLOCK), kernel, rtol=0 if kind == "nf4" else 2e-7)


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.27), ("nf4", 0.16)])
def test_storage(kind, share):
    kernel = kernel_of(576, 192)
    stored = sum(leaf.nbytes for leaf in quantize(jnp.asarray(kernel), kind).values())
    assert stored <= share * kernel.nbytes


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("inputs", [BLOCK, 50, 3 * BLOCK])
def test_product_and_its_gradient_are_those_of_the_dequantised_kernel(kind, inputs):
    rng = np.random.default_rng(1)
    x, weights = rng.normal(size=(5, inputs)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    quantized = quantize(jnp.asarray(kernel_of(inputs, 4)), kind)
    dense = np.asarray(dequantize(quantized, inputs), np.float64)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(weights * quantized_matmul(x, quantized)))(x)
    np.testing.assert_allclose(value, np.sum(weights * (x.astype(np.float64) @ dense)), rtol=1e-5)
    np.testing.assert_allclose(gradient, weights.astype(np.float64) @ dense.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_nothing_dense_is_kept_for_the_backward_pass(kind):
    """The residuals of the product are the codes, not the kernel they stand for."""
    quantized = quantize(jnp.asarray(kernel_of(4 * BLOCK, 256)), kind)
    _, pullback = jax.vjp(lambda x: quantized_matmul(x, quantized), jnp.ones((2, 4 * BLOCK)))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))
    assert 0 < kept <= sum(leaf.nbytes for leaf in quantized.values())
