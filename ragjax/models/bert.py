"""BERT as a sentence encoder (MiniLM): token states, mean pooling, unit length.

Devlin et al. 2018, arXiv 1810.04805; Reimers and Gurevych 2019, arXiv 1908.10084 for the pooling. Field and
parameter names are Hugging Face's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ragjax.errors import UserError
from ragjax.models.attention import attention_mask, dot_product_attention
from ragjax.models.layers import Projection, stack_layers

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape of a BERT encoder (Hugging Face's field names) and the dtype it computes in."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    dtype: str = "float32"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> "BertConfig":
        """Reads config.json.

        Raises:
          UserError: naming a field that would change the result and is not supported, or that is missing.
        """
        for field, default, supported in (
            ("model_type", None, "bert"),
            ("hidden_act", "gelu", "gelu"),
            ("position_embedding_type", "absolute", "absolute"),
        ):
            value = config.get(field, default)
            if value != supported:
                raise UserError(f"config.json has {field} = {value!r}, but this encoder supports only {supported!r}.")
        fields = [field.name for field in dataclasses.fields(cls) if field.name != "dtype"]
        missing = [name for name in fields if name not in config]
        if missing:
            raise UserError(f"config.json lacks {missing[0]!r}, which a bert model needs.")
        return cls(**{name: config[name] for name in fields}, **overrides)


class Embeddings(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, tokens, positions):
        config = self.config
        words = nn.Embed(config.vocab_size, config.hidden_size, name="word_embeddings")(tokens)
        places = nn.Embed(config.max_position_embeddings, config.hidden_size, name="position_embeddings")(positions)
        types = nn.Embed(config.type_vocab_size, config.hidden_size, name="token_type_embeddings")
        total = words + places + types(jnp.zeros_like(tokens))
        return _layer_norm(config)(total).astype(config.dtype)


class SelfAttention(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x, mask):
        heads = (*x.shape[:2], self.config.num_attention_heads, -1)
        queries, keys, values = (
            _dense(self.config, name, self.config.hidden_size)(x).reshape(heads) for name in ("query", "key", "value")
        )
        return dot_product_attention(queries, keys, values, mask).reshape(x.shape)


class AddAndNorm(nn.Module):
    """LayerNorm(residual + dense(x))."""

    config: BertConfig

    @nn.compact
    def __call__(self, x, residual):
        x = _dense(self.config, "dense", self.config.hidden_size)(x)
        return _layer_norm(self.config)(residual + x).astype(self.config.dtype)


class Attention(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x, mask):
        mixed = SelfAttention(self.config, name="self")(x, mask)
        return AddAndNorm(self.config, name="output")(mixed, x)


class Intermediate(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x):
        return nn.gelu(_dense(self.config, "dense", self.config.intermediate_size)(x), approximate=False)


class BertLayer(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x, mask):
        x = Attention(self.config, name="attention")(x, mask)
        widened = Intermediate(self.config, name="intermediate")(x)
        return AddAndNorm(self.config, name="output")(widened, x), None


class Encoder(nn.Module):
    config: BertConfig

    @nn.compact
    def __call__(self, x, mask):
        layers = stack_layers(
            BertLayer, self.config.num_hidden_layers, scan=True, remat="none", in_axes=(nn.broadcast,)
        )
        return layers(self.config, name="layer")(x, mask)[0]


class Bert(nn.Module):
    """tokens -> hidden states."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: Array, segment_ids: Array, positions: Array) -> Array:
        """Token states [R, S, D] of tokens, segment_ids (0: padding) and positions, all [R, S] int."""
        mask = attention_mask(segment_ids, positions, segment_ids, positions, causal=False)
        x = Embeddings(self.config, name="embeddings")(tokens, positions)
        return Encoder(self.config, name="encoder")(x, mask)


def sentence_vectors(module: nn.Module, variables: Mapping[str, Any], tokens: Array, lengths: Array) -> Array:
    """Unit sentence vectors: the mean over the real tokens' states (specials included), scaled to length one.

    Args:
      module: the encoder.
      variables: its collections, {"params": ...}.
      tokens: [B, S] int, right-padded.
      lengths: [B] int, number of real tokens; a filler row has 0 and gives the zero vector.

    Returns:
      [B, E] float32.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    real = positions < lengths[:, None]
    hidden = module.apply(variables, tokens, real.astype(jnp.int32), positions).astype(jnp.float32)
    # Masked, not multiplied: a filler's states must not reach the sum even if they were not finite.
    total = jnp.sum(jnp.where(real[:, :, None], hidden, 0.0), axis=1)
    mean = total / jnp.maximum(lengths, 1)[:, None]
    # rsqrt of the guarded square keeps the gradient of a zero vector finite.
    return mean * jax.lax.rsqrt(jnp.maximum(jnp.sum(mean * mean, axis=-1, keepdims=True), 1e-24))


def _dense(config: BertConfig, name: str, features: int) -> Projection:
    return Projection(features, use_bias=True, dtype=jnp.dtype(config.dtype), name=name)


def _layer_norm(config: BertConfig) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=jnp.float32, name="LayerNorm")
