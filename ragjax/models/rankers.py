"""Encoders with a head that reads a question and a passage together: tokens of the pair -> one score.

Nogueira and Cho 2019, arXiv 1901.04085. The heads are those of Hugging Face's BertForSequenceClassification and
MPNetForSequenceClassification with one label; parameter names are theirs.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, Float32, Int

from ragjax.arrays import AnyArray, Array
from ragjax.models.bert import Bert, BertConfig
from ragjax.models.encoders import EncoderConfig, dense
from ragjax.models.mpnet import MPNet, MPNetConfig


class Head(nn.Module):
    """The first token's state -> a score: a layer, tanh, and one output."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "R S D"]) -> Float32[Array, " R"]:
        pooled = jnp.tanh(dense(self.config, "dense", self.config.hidden_size)(hidden[:, 0]))
        return dense(self.config, "out_proj", 1)(pooled)[:, 0].astype(jnp.float32)


class BertRanker(nn.Module):
    """(tokens, segment_ids, positions, token_types) -> a score for each row; one pair a row."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[AnyArray, "R S"],
        segment_ids: Int[AnyArray, "R S"],
        positions: Int[AnyArray, "R S"],
        token_types: Int[AnyArray, "R S"],
    ) -> Float32[Array, " R"]:
        hidden = Bert(self.config, name="backbone")(tokens, segment_ids, positions, token_types)
        return Head(self.config, name="head")(hidden)


class MPNetRanker(nn.Module):
    """The same; MPNet tells question and passage apart by the tokens between them."""

    config: MPNetConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[AnyArray, "R S"],
        segment_ids: Int[AnyArray, "R S"],
        positions: Int[AnyArray, "R S"],
        token_types: Int[AnyArray, "R S"],
    ) -> Float32[Array, " R"]:
        hidden = MPNet(self.config, name="backbone")(tokens, segment_ids, positions)
        return Head(self.config, name="head")(hidden)
