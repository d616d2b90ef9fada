"""BERT as a sentence encoder (MiniLM): tokens -> hidden states.

Devlin et al. 2018, arXiv 1810.04805. Field and parameter names are Hugging Face's.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float, Int

from ragjax.arrays import AnyArray, Array
from ragjax.models.attention import attention_mask
from ragjax.models.encoders import AddAndNorm, EncoderConfig, Intermediate, attend, layer_norm
from ragjax.models.layers import stack_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """Shape of a BERT encoder."""

    supported: ClassVar = (
        ("model_type", None, "bert"),
        ("hidden_act", "gelu", "gelu"),
        ("position_embedding_type", "absolute", "absolute"),
        ("is_decoder", False, False),
        ("add_cross_attention", False, False),
    )

    vocab_size: int = 30522
    type_vocab_size: int = 2


class Embeddings(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(
        self, tokens: Int[AnyArray, "R S"], positions: Int[AnyArray, "R S"], token_types: Int[AnyArray, "R S"]
    ) -> Float[Array, "R S D"]:
        config = self.config
        words = nn.Embed(config.vocab_size, config.hidden_size, name="word_embeddings")(tokens)
        places = nn.Embed(config.max_position_embeddings, config.hidden_size, name="position_embeddings")(positions)
        types = nn.Embed(config.type_vocab_size, config.hidden_size, name="token_type_embeddings")
        return layer_norm(config, words + places + types(token_types))


class SelfAttention(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "R S D"], mask: Bool[AnyArray, "R S S"]) -> Float[Array, "R S D"]:
        return attend(self.config, ("query", "key", "value"), x, mask)


class Attention(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "R S D"], mask: Bool[AnyArray, "R S S"]) -> Float[Array, "R S D"]:
        mixed = SelfAttention(self.config, name="self")(x, mask)
        return AddAndNorm(self.config, name="output")(mixed, x)


class BertLayer(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "R S D"], mask: Bool[AnyArray, "R S S"]) -> tuple[Float[Array, "R S D"], None]:
        x = Attention(self.config, name="attention")(x, mask)
        widened = Intermediate(self.config, name="intermediate")(x)
        return AddAndNorm(self.config, name="output")(widened, x), None


class Encoder(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "R S D"], mask: Bool[AnyArray, "R S S"]) -> Float[Array, "R S D"]:
        layers = stack_layers(
            BertLayer, self.config.num_hidden_layers, scan=True, remat="none", in_axes=(nn.broadcast,)
        )
        return layers(self.config, name="layer")(x, mask)[0]


class Bert(nn.Module):
    """tokens -> hidden states."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[AnyArray, "R S"],
        segment_ids: Int[AnyArray, "R S"],
        positions: Int[AnyArray, "R S"],
        token_types: Int[AnyArray, "R S"] | None = None,
    ) -> Float[Array, "R S D"]:
        """Token states; segment 0 is padding. token_types: 1 for the second text of a pair, else 0; 0 by default."""
        mask = attention_mask(segment_ids, positions, segment_ids, positions, causal=False)
        types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = Embeddings(self.config, name="embeddings")(tokens, positions, types)
        return Encoder(self.config, name="encoder")(x, mask)
