"""The letters of shapes, each with one meaning throughout, and the names of types that many modules share.

    B  questions of a batch               R  token rows, into which prompts are packed, or sequences of a batch
    K  passages of a question             S  tokens of a row, padding included
    P  passages of a corpus, or           T  tokens of an answer, its end token included
       candidates of a ranking step       U  different answers to a question that are scored
    E  width of a sentence vector         Q  beams of a question: branches over its prompts
    D  width of a network's states        C  keys that a query can meet: of a row, or slots of a cache
    F  width of a feed-forward layer      L  layers
    H  width of a head                    V  tokens of a vocabulary
    N  query heads                        M  key-value heads
    G  query heads of a key-value head, N / M        W  tokens of a question, padding included

Small letters are counts of one call that no other shape is tied to: b of the B questions asked for, n texts or prompts.
Annotations use the same letters, `Float[Array, "B K"]`: within a call one letter has one size, which the tests check.
Networks see sequences [R, S]: of an encoder texts, of a decoder packed prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

Array = jax.Array
# What a compiled function takes: an array of the device, a traced one, or one of the host.
AnyArray = jax.Array | np.ndarray
# A number that may be traced, with the shape [].
Scalar = float | jax.Array
# Parameters of a network, by their path: nested dicts with arrays as leaves.
Tree = Mapping[str, Any]
# What a Flax module is applied to: {collection ("params", "lora"): its tree}.
Variables = Mapping[str, Tree]
# Of several models: {"embedder" | "generator": its variables}.
ModelVariables = Mapping[str, Variables]
# Tokens of a text, of any length.
Ids = Sequence[int]
