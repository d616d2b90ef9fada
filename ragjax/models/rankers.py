"""Encoders with a head that reads a question and a passage together: tokens of the pair -> one score.

Nogueira and Cho 2019, arXiv 1901.04085. The heads are those of Hugging Face's BertForSequenceClassification and
MPNetForSequenceClassification with one label; parameter names are theirs.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, Float32, Int

from ragjax.arrays import AnyArray, Array
from ragjax.models.bert import Bert
from ragjax.models.encoders import EncoderConfig, dense


class Head(nn.Module):
    """The first token's state -> a score: a layer, tanh, and one output."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "R S D"]) -> Float32[Array, " R"]:
        pooled = jnp.tanh(dense(self.config, "dense", self.config.hidden_size)(hidden[:, 0]))
        return dense(self.config, "out_proj", 1)(pooled)[:, 0].astype(jnp.float32)


class Ranker(nn.Module):
    """(tokens, segment_ids, positions, token_types) -> a score for each row; one pair a row.

    encoder: Bert, or MPNet, which tells question and passage apart by the tokens between them.
    """

    config: EncoderConfig
    encoder: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self,
        tokens: Int[AnyArray, "R S"],
        segment_ids: Int[AnyArray, "R S"],
        positions: Int[AnyArray, "R S"],
        token_types: Int[AnyArray, "R S"],
    ) -> Float32[Array, " R"]:
        types = (token_types,) if self.encoder is Bert else ()
        hidden = self.encoder(self.config, name="backbone")(tokens, segment_ids, positions, *types)
        return Head(self.config, name="head")(hidden)
