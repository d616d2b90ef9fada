"""Frozen matrices in 4 or 8 bits, and the product with one.

A kernel [in, out] is cut along its inputs into blocks of 64. A block keeps its largest magnitude (absmax) in float32
and its numbers as shares of that: 8-bit integers of 127ths (int8), or indices into the sixteen levels of NF4, two to
a byte. A quantised kernel is a dict of two leaves, which stack over layers as any other leaf does:

    int8   codes int8 [in, out]              absmax float32 [blocks, out]     1.06 bytes a weight
    nf4    codes uint8 [32 * blocks, out]    absmax float32 [blocks, out]     0.56 bytes a weight

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, section 3 and appendix E. The second quantisation of the absmax
numbers, which that paper adds, is left out: it would save another 0.05 bytes a weight.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, UInt8

from ragjax.arrays import AnyArray, Array
from ragjax.models.products import matmul

Quantized = Mapping[str, AnyArray]

BLOCK = 64

# Eight levels from -1 to 0 and nine from 0 to 1, the zero shared: quantiles of the normal distribution, scaled so
# that the outermost are -1 and 1 (QLoRA, appendix E).
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def quantize(kernel: Float[AnyArray, "inputs outputs"], kind: str) -> dict[str, Array]:
    """Rounds a kernel to the nearest levels; see the module's docstring for the result."""
    inputs, outputs = kernel.shape
    blocks = -(-inputs // BLOCK)
    padded = jnp.pad(kernel.astype(jnp.float32), ((0, blocks * BLOCK - inputs), (0, 0)))
    padded = padded.reshape(blocks, BLOCK, outputs)
    absmax = jnp.max(jnp.abs(padded), axis=1)
    shares = padded / jnp.where(absmax > 0, absmax, 1.0)[:, None]
    if kind == "int8":
        codes = jnp.round(127 * shares).astype(jnp.int8).reshape(-1, outputs)[:inputs]
        return {"codes": codes, "absmax": absmax}
    levels = np.array(NF4_LEVELS, np.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    # Counting the middles below is the index of the nearest level, and runs without a table.
    nearest = sum(((shares > middle).astype(jnp.uint8) for middle in middles), jnp.zeros(shares.shape, jnp.uint8))
    low, high = nearest[:, : BLOCK // 2], nearest[:, BLOCK // 2 :]
    return {"codes": (low | (high << 4)).reshape(-1, outputs), "absmax": absmax}


def dequantize(quantized: Quantized, inputs: int, dtype: DTypeLike = jnp.float32) -> Float[Array, "inputs outputs"]:
    """The kernel that the codes stand for."""
    codes, absmax = quantized["codes"], quantized["absmax"]
    blocks, outputs = absmax.shape
    if codes.dtype == jnp.int8:
        codes = jnp.pad(codes, ((0, blocks * BLOCK - inputs), (0, 0)))
        shares = codes.reshape(blocks, BLOCK, outputs).astype(jnp.float32) / 127
    else:
        codes = codes.reshape(blocks, BLOCK // 2, outputs)
        # In two halves of a block: the low and the high four bits.
        shares = jnp.concatenate([_nf4_shares(codes & 15), _nf4_shares(codes >> 4)], axis=1)
    return (shares * absmax[:, None]).reshape(-1, outputs)[:inputs].astype(dtype)


def _nf4_shares(codes: UInt8[AnyArray, "*axes"]) -> Float[Array, "*axes"]:
    return jnp.asarray(NF4_LEVELS, jnp.float32)[codes]


def quantized_matmul(x: Float[AnyArray, "n inputs"], kernel: Quantized) -> Float[Array, "n outputs"]:
    """x times a quantised kernel, in the dtype of x.

    The gradient goes to x alone, and the kernel is dequantised again for it: kept, it would be as large as the
    matrix that quantising was to save.
    """
    return _matmul(x.shape[-1], x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(inputs: int, x: Float[AnyArray, "n inputs"], kernel: Quantized) -> Float[Array, "n outputs"]:
    return matmul(x, dequantize(kernel, inputs, x.dtype))


def _forward(
    inputs: int, x: Float[AnyArray, "n inputs"], kernel: Quantized
) -> tuple[Float[Array, "n outputs"], Quantized]:
    return _matmul(inputs, x, kernel), kernel


def _backward(
    inputs: int, kernel: Quantized, gradient: Float[Array, "n outputs"]
) -> tuple[Float[Array, "n inputs"], None]:
    return matmul(gradient, dequantize(kernel, inputs, gradient.dtype).T), None


_matmul.defvjp(_forward, _backward)
