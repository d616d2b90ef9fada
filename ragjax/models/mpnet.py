"""MPNet as a sentence encoder: tokens -> hidden states.

Song et al. 2020, arXiv 2004.09297; Raffel et al. 2020, arXiv 1910.10683, section 2.1, for the relative positions.
Field and parameter names are Hugging Face's.

Notable choices
- Each head adds a learned bias to its scores, by the distance between query and key; all layers share the biases.
- A distance takes its bucket from a table of integers, so no rounding of logarithms decides at a bucket's edge.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Bool, Float, Int

from ragjax.arrays import AnyArray, Array
from ragjax.models.attention import attention_mask
from ragjax.models.encoders import AddAndNorm, EncoderConfig, Intermediate, attend, dense, layer_norm
from ragjax.models.layers import stack_layers

_BUCKETS = 32  # half for keys before the query, half for those behind it
_FARTHEST = 128  # the distance at which buckets would end; the last one takes all that are farther, too


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPNetConfig(EncoderConfig):
    """Shape of an MPNet encoder."""

    supported: ClassVar = (
        ("model_type", None, "mpnet"),
        ("hidden_act", "gelu", "gelu"),
        ("relative_attention_num_buckets", _BUCKETS, _BUCKETS),
    )
    first_position: ClassVar = 2  # behind the row of the padding token, which has the id 1

    vocab_size: int = 30527


def relative_position_buckets(distance: Int[AnyArray, "*axes"]) -> Int[Array, "*axes"]:
    """Bucket 0 to 31 of each distance (the key's position less the query's).

    One bucket each for distances 0 to 7 backward; 8 more, of widths that grow by sqrt(2), up to 128 and beyond; then
    as many forward, where the bucket of distance 0 stays empty.
    """
    return jnp.asarray(_bucket_table())[jnp.clip(distance, -_FARTHEST, _FARTHEST) + _FARTHEST]


def _bucket_table() -> np.ndarray:
    """Buckets of the distances -128 to 128."""
    half, exact = _BUCKETS // 2, _BUCKETS // 4
    growing = half - exact
    ratio = _FARTHEST // exact
    # Bucket `exact` + k starts at the first d with d >= exact * ratio**(k / growing): here in whole numbers.
    starts = [*range(1, exact + 1)]
    starts += [
        next(d for d in range(exact, _FARTHEST) if d**growing >= exact**growing * ratio**k) for k in range(1, growing)
    ]
    distances = np.arange(-_FARTHEST, _FARTHEST + 1)
    buckets = np.searchsorted(starts, np.abs(distances), side="right")
    return (buckets + half * (distances > 0)).astype(np.int32)


class Embeddings(nn.Module):
    config: MPNetConfig

    @nn.compact
    def __call__(self, tokens: Int[AnyArray, "R S"], positions: Int[AnyArray, "R S"]) -> Float[Array, "R S D"]:
        config = self.config
        words = nn.Embed(config.vocab_size, config.hidden_size, name="word_embeddings")(tokens)
        places = nn.Embed(config.max_position_embeddings, config.hidden_size, name="position_embeddings")
        return layer_norm(config, words + places(positions + config.first_position))


class SelfAttention(nn.Module):
    config: MPNetConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "R S D"], mask: Bool[AnyArray, "R S S"], bias: Float[Array, "N R S S"]
    ) -> Float[Array, "R S D"]:
        mixed = attend(self.config, ("q", "k", "v"), x, mask, bias)
        return dense(self.config, "o", self.config.hidden_size)(mixed)


class Attention(nn.Module):
    config: MPNetConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "R S D"], mask: Bool[AnyArray, "R S S"], bias: Float[Array, "N R S S"]
    ) -> Float[Array, "R S D"]:
        return layer_norm(self.config, x + SelfAttention(self.config, name="attn")(x, mask, bias))


class MPNetLayer(nn.Module):
    config: MPNetConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "R S D"], mask: Bool[AnyArray, "R S S"], bias: Float[Array, "N R S S"]
    ) -> tuple[Float[Array, "R S D"], None]:
        x = Attention(self.config, name="attention")(x, mask, bias)
        widened = Intermediate(self.config, name="intermediate")(x)
        return AddAndNorm(self.config, name="output")(widened, x), None


class Encoder(nn.Module):
    config: MPNetConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "R S D"], mask: Bool[AnyArray, "R S S"], positions: Int[AnyArray, "R S"]
    ) -> Float[Array, "R S D"]:
        config = self.config
        buckets = relative_position_buckets(positions[:, None, :] - positions[:, :, None])
        biases = nn.Embed(_BUCKETS, config.num_attention_heads, name="relative_attention_bias")
        bias = biases(buckets).transpose(3, 0, 1, 2)
        layers = stack_layers(
            MPNetLayer, config.num_hidden_layers, scan=True, remat="none", in_axes=(nn.broadcast, nn.broadcast)
        )
        return layers(config, name="layer")(x, mask, bias)[0]


class MPNet(nn.Module):
    """tokens -> hidden states."""

    config: MPNetConfig

    @nn.compact
    def __call__(
        self, tokens: Int[AnyArray, "R S"], segment_ids: Int[AnyArray, "R S"], positions: Int[AnyArray, "R S"]
    ) -> Float[Array, "R S D"]:
        """Token states; segment 0 is padding."""
        mask = attention_mask(segment_ids, positions, segment_ids, positions, causal=False)
        x = Embeddings(self.config, name="embeddings")(tokens, positions)
        return Encoder(self.config, name="encoder")(x, mask, positions)
