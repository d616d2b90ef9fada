"""Matrix products whose precision is the same on every device.

GPUs and TPUs multiply float32 numbers at reduced precision unless they are told otherwise: TF32 keeps 10 bits of a
factor's mantissa, one bfloat16 pass 7. Whoever asks for float32 here gets float32; whoever wants speed asks for
bfloat16 (`--dtype=bfloat16`), whose products are exact and summed up in float32 by the hardware.
"""

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
