"""What the sentence encoders share: their settings, parts of a layer, and the way from token states to a vector.

Reimers and Gurevych 2019, arXiv 1908.10084, for the poolings.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float, Float32, Int

from ragjax.arrays import AnyArray, Array, Variables
from ragjax.errors import UserError
from ragjax.models.attention import dot_product_attention
from ragjax.models.layers import Projection
from ragjax.settings import Settings

# How the states of a text's tokens become one vector: their mean, the first token's, or the largest of each number.
POOLINGS = ("mean", "cls", "max")

# Not `Self`, which beartype can check in decorated classes alone.
Config = TypeVar("Config", bound="EncoderConfig")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of an encoder (Hugging Face's field names and defaults), its pooling, and the dtype it computes in."""

    # (field of config.json, its value where it is left out, the one value that is supported)
    supported: ClassVar[tuple[tuple[str, Any, Any], ...]]
    first_position: ClassVar[int] = 0  # row of the position table that a text's first token takes

    vocab_size: int
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    dtype: str = "float32"
    pooling: str = "mean"

    @property
    def longest_input(self) -> int:
        """Tokens that a text may have."""
        return self.max_position_embeddings - self.first_position

    @classmethod
    def from_hf(cls: type[Config], config: Mapping[str, Any], **overrides: Any) -> Config:
        """Reads config.json; what it leaves out is as transformers has it.

        Raises:
          UserError: naming a field that would change the result and is not supported, or that holds no such value.
        """
        settings = Settings.of(config)
        for field, default, supported in cls.supported:
            settings.one_of(field, default, supported)
        kinds = {field.name: field for field in dataclasses.fields(cls) if field.name not in ("dtype", "pooling")}
        given: dict[str, Any] = {
            name: settings.integer(name) if kinds[name].type is int else settings.number(name)
            for name in kinds
            if settings.get(name) is not None
        }
        read = cls(**given, **overrides)
        if read.hidden_size % read.num_attention_heads:
            raise UserError(
                f"{settings.where} has num_attention_heads = {read.num_attention_heads}, which do not divide "
                f"hidden_size = {read.hidden_size} evenly."
            )
        return read


def attend(
    config: EncoderConfig,
    names: tuple[str, str, str],
    x: Float[Array, "R S D"],
    mask: Bool[AnyArray, "R S S"],
    bias: Float[Array, "N R S S"] | None = None,
) -> Float[Array, "R S D"]:
    """Self-attention of states before its output projection.

    Called inside a module, which gets the query, key and value projections under `names`. For `mask` and `bias` see
    `dot_product_attention`.
    """
    heads = (*x.shape[:2], config.num_attention_heads, -1)
    queries, keys, values = (dense(config, name, config.hidden_size)(x).reshape(heads) for name in names)
    return dot_product_attention(queries, keys, values, mask, bias).reshape(x.shape)


class Intermediate(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "R S D"]) -> Float[Array, "R S F"]:
        return nn.gelu(dense(self.config, "dense", self.config.intermediate_size)(x), approximate=False)


class AddAndNorm(nn.Module):
    """LayerNorm(residual + dense(x))."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "R S width"], residual: Float[Array, "R S D"]) -> Float[Array, "R S D"]:
        x = dense(self.config, "dense", self.config.hidden_size)(x)
        return layer_norm(self.config, residual + x)


def dense(config: EncoderConfig, name: str, features: int) -> Projection:
    return Projection(features, use_bias=True, dtype=jnp.dtype(config.dtype), name=name)


def layer_norm(config: EncoderConfig, x: Float[Array, "R S D"]) -> Float[Array, "R S D"]:
    """The calling module's `LayerNorm`, in float32 inside."""
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=jnp.float32, name="LayerNorm")(x).astype(config.dtype)


def sentence_vectors(
    module: nn.Module, variables: Variables, tokens: Int[AnyArray, "B S"], lengths: Int[AnyArray, " B"]
) -> Float32[Array, "B E"]:
    """Unit sentence vectors: the pooled states of the real tokens (specials included), scaled to length one.

    Args:
      module: the encoder, whose configuration names the pooling.
      variables: its collections, {"params": ...}.
      tokens: right-padded.
      lengths: number of real tokens; a filler row has 0 and gives the zero vector.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    real = positions < lengths[:, None]
    hidden = module.bind(variables)(tokens, real.astype(jnp.int32), positions).astype(jnp.float32)
    pooled = _pool(module.config.pooling, hidden, real[:, :, None])
    # rsqrt of the guarded square keeps the gradient of a zero vector finite.
    return pooled * jax.lax.rsqrt(jnp.maximum(jnp.sum(pooled * pooled, axis=-1, keepdims=True), 1e-24))


def _pool(pooling: str, hidden: Float32[Array, "B S E"], real: Bool[Array, "B S 1"]) -> Float32[Array, "B E"]:
    """Of the states at real places; zeros where there is none.

    Masked, not multiplied: a filler's states must not reach the result even if they were not finite.
    """
    if pooling == "cls":
        return jnp.where(real[:, 0], hidden[:, 0], 0.0)
    if pooling == "max":
        return jnp.where(real[:, 0], jnp.max(jnp.where(real, hidden, -jnp.inf), axis=1), 0.0)
    count = jnp.sum(real, axis=1)
    return jnp.sum(jnp.where(real, hidden, 0.0), axis=1) / jnp.maximum(count, 1)
