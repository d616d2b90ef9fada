"""Matrix products whose precision is the same on every device.

GPUs and TPUs multiply float32 numbers at reduced precision unless they are told otherwise: TF32 keeps 10 bits of a
factor's mantissa, one bfloat16 pass 7. Whoever asks for float32 here gets float32; whoever wants speed asks for
bfloat16 (`--dtype=bfloat16`), whose products are exact and summed up in float32 by the hardware.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from ragjax.arrays import AnyArray, Array


def matmul(x: Float[AnyArray, "*rows n k"], y: Float[AnyArray, "*batch k m"]) -> Float[Array, "*rows n m"]:
    """x times y in their common dtype; float32 at full precision."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)


def float32_matmul(x: Float[AnyArray, "*rows n k"], y: Float[AnyArray, "*batch k m"]) -> Float32[Array, "*rows n m"]:
    """x times y, where sums are not rounded to the operands' dtype: float32.

    For what a softmax reads: a logit near 11 has an error of up to 0.03 in bfloat16. The products of the backward
    pass take their gradient in the operands' dtype; jax's own rule would multiply float32 by bfloat16, which runs as
    a float32 product, at a fraction of the speed.
    """
    return matmul(x, y) if x.dtype == jnp.float32 else _float32_matmul(x, y)


@jax.custom_vjp
def _float32_matmul(x: Float[AnyArray, "*rows n k"], y: Float[AnyArray, "*batch k m"]) -> Float32[Array, "*rows n m"]:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _forward(x: AnyArray, y: AnyArray) -> tuple[Array, tuple[AnyArray, AnyArray]]:
    return _float32_matmul(x, y), (x, y)


def _backward(operands: tuple[AnyArray, AnyArray], gradient: Array) -> tuple[Array, Array]:
    _, pull_back = jax.vjp(jnp.matmul, *operands)
    return pull_back(gradient.astype(operands[0].dtype))


_float32_matmul.defvjp(_forward, _backward)


def weight_product(x: Float[AnyArray, "*rows k"], w: Float[AnyArray, "k m"], wide: bool = False) -> Float[Array, "..."]:
    """x times a weight, in the dtype of x or (`wide`) float32; the weight's gradient is summed in the weight's dtype.

    A trained weight is float32 whatever the states are. jax's own rule would round its gradient to the dtype of x
    first. Where the rows lie on several devices that is done to each device's part of the sum: in bfloat16 their order
    then decides the sign of a small gradient, which Adam's first step makes as large as any other.
    """
    if x.dtype == jnp.float32 or w.dtype == x.dtype:
        return _product(x, w.astype(x.dtype), wide)
    return _weight_product(wide, x, w)


def _product(x: AnyArray, y: AnyArray, wide: bool) -> Array:
    return float32_matmul(x, y) if wide else matmul(x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weight_product(wide: bool, x: AnyArray, w: AnyArray) -> Array:
    return _product(x, w.astype(x.dtype), wide)


def _weight_forward(wide: bool, x: AnyArray, w: AnyArray) -> tuple[Array, tuple[AnyArray, AnyArray]]:
    return _weight_product(wide, x, w), (x, w)


def _weight_backward(wide: bool, operands: tuple[AnyArray, AnyArray], gradient: Array) -> tuple[Array, Array]:
    x, w = operands
    gradient = gradient.astype(x.dtype)
    of_rows, rows = gradient.reshape(-1, w.shape[1]), x.reshape(-1, w.shape[0])
    return matmul(gradient, w.astype(x.dtype).T), jnp.matmul(rows.T, of_rows, preferred_element_type=w.dtype)


_weight_product.defvjp(_weight_forward, _weight_backward)
