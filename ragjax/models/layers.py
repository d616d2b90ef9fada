"""Layers that both model families share: the projection with an optional adapter, and the scan over layers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Key

from ragjax.arrays import AnyArray, Array
from ragjax.models.lora import COLLECTION, LoraConfig, lora_delta
from ragjax.models.products import matmul, weight_product
from ragjax.models.quantize import Quantized, quantize, quantized_matmul
from ragjax.parallel import FETCHED, layer_fetcher

# Names the output of a linear layer for rematerialisation.
_LINEAR = "linear"


class Projection(nn.Module):
    """y = x W (+ b), plus a low-rank adapter where `lora` is given. Kernel [in, out], quantised to `quantize`.

    A transposed kernel [out, in] stands on the left of the product: with the eight rows of a decoding step XLA's CPU
    kernels took two thirds of the time.
    """

    features: int
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    lora: LoraConfig | None = None
    quantize: str | None = None
    is_transposed: bool = False

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "*rows width"], dropout_ids: Int[AnyArray, "R S"] | None = None
    ) -> Float[Array, "*rows features"]:
        shape = (x.shape[-1], self.features)
        # Flat rows: with an adapter the backward pass ran 1.7 times faster on CPU than with [R, S, in] inputs.
        flat = x.reshape(-1, x.shape[-1])
        if self.quantize:
            quantized = self.param("kernel", _init_quantized, shape, self.quantize)
            y = quantized_matmul(flat.astype(self.dtype), quantized)
        elif self.is_transposed:
            kernel = self.param("kernel", _init_kernel, shape[::-1])
            # The barrier: XLA would move the transposition into the product, which puts the rows on the left again.
            y = jax.lax.optimization_barrier(matmul(kernel.astype(self.dtype), flat.T)).T
        else:
            kernel = self.param("kernel", _init_kernel, shape)
            y = weight_product(flat, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            # In float32: its gradient is a sum over all rows, which a GPU would add up in bfloat16.
            y = (y.astype(jnp.float32) + bias).astype(self.dtype)
        if self.lora is not None:
            y = y + lora_delta(self, x, self.features, self.lora, dropout_ids)
        # What partial rematerialisation keeps: the sum alone, not the base's and the adapter's products.
        return checkpoint_name(y, _LINEAR).reshape(*x.shape[:-1], self.features)


_init_kernel = nn.initializers.lecun_normal()


def _init_quantized(key: Key[Array, ""], shape: tuple[int, int], kind: str) -> Quantized:
    return quantize(_init_kernel(key, shape), kind)


def stack_layers(block: type[nn.Module], layers: int, scan: bool, remat: str, in_axes: Any) -> Any:
    """A stack of `layers` equal blocks whose parameters carry a leading layer axis.

    Args:
      block: a module whose call is (carry, *inputs) -> (carry, output).
      layers: how many.
      scan: one compiled layer in a loop; False unrolls the loop (same parameters, longer compilation, and every
        operation visible to XLA's cost analysis).
      remat: what the backward pass computes again instead of keeping it: "full": everything inside a layer;
        "partial": all but the outputs of its linear layers; "none".
      in_axes: for each input, 0 where it has a layer axis, `nn.broadcast` where all layers share it.
    """
    fetch = layer_fetcher()
    if fetch is not None:
        block = nn.map_variables(block, ("params", COLLECTION), fetch)
    if remat != "none" or fetch is not None:
        policies = jax.checkpoint_policies
        # By name, as a policy that looks for products does not see the quantised ones inside their custom_vjp. Kept,
        # what each layer fetches from other devices would be the whole model in the end.
        kept = {
            "full": None,
            "partial": policies.save_only_these_names(_LINEAR),
            "none": policies.save_anything_except_these_names(FETCHED),
        }
        # A scan's body is compiled once, so nothing could merge the two computations: no need to prevent it.
        block = nn.remat(block, prevent_cse=not scan, policy=kept[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0, COLLECTION: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=layers,
        unroll=1 if scan else layers,
    )
