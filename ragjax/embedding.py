"""Token ids to sentence vectors: batches of like length, shared out over all local devices."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Float32, Int

from ragjax.arrays import AnyArray, Array, Ids, Variables
from ragjax.data.batches import LikeBatch, like_batches, pad_tokens
from ragjax.models.encoders import sentence_vectors
from ragjax.parallel import REPLICATED, device_count

_CPU_TOKENS = 512  # of a batch on a CPU: four times as many ran at nine tenths of the speed


@functools.partial(jax.jit, static_argnames="module")
def embed(
    module: nn.Module, variables: Variables, tokens: Int[AnyArray, "B S"], lengths: Int[AnyArray, " B"]
) -> Float32[Array, "B E"]:
    """Compiled `sentence_vectors`."""
    return sentence_vectors(module, variables, tokens, lengths)


def embed_all(
    module: nn.Module,
    variables: Variables,
    tokens: Sequence[Ids],
    *,
    width: int,
    longest: int,
    batch_size: int,
    advance: Callable[[int], object],
) -> Float32[np.ndarray, "n E"]:
    """Vectors [n, E] of any number of texts, in their order, whatever the batch size.

    Args:
      module: the encoder.
      variables: its variables; `REPLICATED.place` has put them on all devices where there are several.
      tokens: [n], the texts' token ids.
      width: E.
      longest: tokens of a text, at most.
      batch_size: texts of a batch on each device, at most.
      advance: is told of every few texts that are done.
    """
    devices = device_count()
    batches = like_batches(
        list(map(len, tokens)), longest, lambda length: min(batch_size, _rows_at_once(length)), devices
    )
    embed_batch = _embed_on_all if devices > 1 else _embed_on_one

    def vectors_of(batch: LikeBatch) -> np.ndarray:
        return embed_batch(module, variables, [tokens[i] for i in batch.chosen], batch)

    vectors = np.empty((len(tokens), width), np.float32)
    # XLA runs much of a small batch on one core, so as many batches run at once as there are cores.
    at_once = os.cpu_count() if jax.default_backend() == "cpu" and devices == 1 else 1
    with ThreadPoolExecutor(at_once) as pool:
        for batch, found in zip(batches, pool.map(vectors_of, batches), strict=True):
            vectors[batch.chosen] = found
            advance(len(batch.chosen))
    return vectors


def _embed_on_one(
    module: nn.Module, variables: Variables, tokens: Sequence[Ids], batch: LikeBatch
) -> Float32[np.ndarray, "n E"]:
    padded, lengths = pad_tokens(tokens, batch.rows, batch.length)
    return np.asarray(embed(module, variables, padded, lengths))[: len(tokens)]


def _embed_on_all(
    module: nn.Module, variables: Variables, tokens: Sequence[Ids], batch: LikeBatch
) -> Float32[np.ndarray, "n E"]:
    """The same, with an equal share of the rows on each device."""
    devices, size = device_count(), batch.rows
    shares = [rows.reshape(devices, size, *rows.shape[1:]) for rows in pad_tokens(tokens, devices * size, batch.length)]
    groups = _embed_groups(module)  # ty: ignore[invalid-argument-type]  a frozen dataclass, so hashable
    found = np.asarray(groups(variables, tuple(shares)))
    return found.reshape(devices * size, -1)[: len(tokens)]


@functools.cache
def _embed_groups(module: nn.Module) -> Callable[[Variables, Any], Any]:
    """`embed` on every device: (placed variables, (tokens, lengths) with an axis of devices) -> vectors, likewise."""
    return REPLICATED.compile_map(lambda variables, texts: sentence_vectors(module, variables, *texts))


def _rows_at_once(length: int) -> int:
    """On a CPU, as few texts as keep a layer's numbers in its cache."""
    return max(_CPU_TOKENS // length, 1) if jax.default_backend() == "cpu" else sys.maxsize
