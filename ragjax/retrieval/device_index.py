"""Search on the accelerator: passage vectors shared out over the devices, a matrix product and a running top-k.

Choices. The vectors lie as [blocks, devices, n, E]: in this order they are the corpus's rows, padded at the end. Every
device goes through its blocks and keeps its k best, so that it has B x n scores at once and nobody B x P;
only the k best of each device meet. The search is a pure function, which a compiled step may call.

float32 vectors give exactly what exact search on the host does. In bfloat16 or int8 (symmetric, a scale of each
vector's own) they take a half or a quarter of the memory, and more candidates than k are proposed: the stored vectors
decide between them, as for every index.
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float32, Int32

from ragjax.arrays import AnyArray, Array
from ragjax.costs import Cost
from ragjax.errors import UserError
from ragjax.models.products import float32_matmul
from ragjax.parallel import device_count, free_device_bytes, map_shares, place_shares
from ragjax.retrieval.exact import exact_rows
from ragjax.retrieval.retriever import Proposal, Queries
from ragjax.retrieval.vectors import VectorStore, as_store

_BLOCK = 1 << 14  # passages that a device scores at once
_QUERIES = 256  # questions that are scored at once
_STORED = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}


class Shards(NamedTuple):
    """The vectors of P passages on the devices."""

    vectors: Array  # [blocks, devices, n, E] float32, bfloat16 or int8, each device's on the device
    scales: Array | None  # [blocks, devices, n] float32, likewise: what int8 vectors are multiplied by
    count: Int32[AnyArray, ""]  # P; rows from there on are padding


def search_on_device(
    queries: Float32[AnyArray, "B E"], shards: Shards, k: int, recall: float = 1.0
) -> tuple[Float32[Array, "B k"], Int32[Array, "B k"]]:
    """Scores and rows of the k passages with the highest inner products, best first; of equal scores the lower row.

    Pure: for use inside a compiled function, whose `k` and `recall` are static.

    Args:
      queries: the questions' vectors.
      shards: from `place_vectors`.
      k: at most P.
      recall: below 1: share of the best passages of a block that a TPU's approximate top-k is expected to find.
    """
    blocks, groups, size, _ = shards.vectors.shape
    starts = jnp.arange(blocks * groups, dtype=jnp.int32).reshape(blocks, groups) * size
    shares = shards.vectors, shards.scales, starts
    scores, rows = map_shares(functools.partial(_best_of_share, k, recall), (queries, shards.count), shares, axis=1)
    scores, rows = (jnp.moveaxis(each, 0, 1).reshape(len(queries), -1) for each in (scores, rows))
    negated, rows = jax.lax.sort((-scores, rows), dimension=1, num_keys=2)
    return -negated[:, :k], rows[:, :k]


def _best_of_share(
    k: int, recall: float, asked: tuple[AnyArray, AnyArray], share: tuple[Array, Array | None, Array]
) -> tuple[Float32[Array, "1 B k"], Int32[Array, "1 B k"]]:
    """The k best of one device's blocks [blocks, 1, n, E]; where it has fewer passages, places of the score -inf."""
    queries, count = asked
    size = share[0].shape[2]
    within = min(k, size)

    def step(best: tuple[Array, Array], block: tuple[Array, Array | None, Array]) -> tuple[tuple[Array, Array], None]:
        vectors, scales, (first,) = block
        scores = _scores(queries, vectors[0], scales)
        scores = jnp.where(first + jnp.arange(size) < count, scores, -jnp.inf)
        if recall < 1:
            found, places = jax.lax.approx_max_k(scores, within, recall_target=recall)
        else:
            found, places = jax.lax.top_k(scores, within)
        # What was found before stands first, and its rows are lower: of equal scores it stays.
        kept, order = jax.lax.top_k(jnp.concatenate([best[0], found], axis=1), k)
        return (kept, jnp.take_along_axis(jnp.concatenate([best[1], first + places], axis=1), order, axis=1)), None

    start = jnp.full((len(queries), k), -jnp.inf, jnp.float32), jnp.zeros((len(queries), k), jnp.int32)
    (scores, rows), _ = jax.lax.scan(step, start, share)
    return scores[None], rows[None]


def _scores(
    queries: Float32[AnyArray, "B E"], vectors: Array, scales: Float32[Array, "1 n"] | None
) -> Float32[Array, "B n"]:
    """Inner products. Codes of 8 bits are exact in bfloat16, so that what is rounded there is the question."""
    if vectors.dtype != jnp.float32:
        queries, vectors = queries.astype(jnp.bfloat16), vectors.astype(jnp.bfloat16)
    products = float32_matmul(queries, vectors.T)
    return products if scales is None else products * scales


def place_vectors(vectors: VectorStore, dtype: str, block: int = _BLOCK) -> Shards:
    """Vectors on the devices, as `dtype`: "float32", "bfloat16" or "int8"; they are read block by block.

    block: passages that a device scores at once, at most.

    Raises UserError where the devices have no room for them.
    """
    count, width = len(vectors), vectors.width
    groups = device_count()
    size = min(block, -(-count // groups))
    blocks = -(-count // (groups * size))
    _check_room(blocks * size * width * np.dtype(_STORED[dtype]).itemsize, dtype)
    scales = _scales(vectors) if dtype == "int8" else None

    def share(group: int) -> np.ndarray:
        part = np.zeros((blocks, 1, size, width), _STORED[dtype])
        for number in range(blocks):
            start = (number * groups + group) * size
            piece = vectors.vectors_of(np.arange(min(start, count), min(start + size, count)))
            if scales is not None:
                piece = np.rint(piece / scales[start : start + size, None])
            part[number, 0, : len(piece)] = piece
        return part

    def scales_of(group: int) -> np.ndarray:
        padded = np.zeros(blocks * groups * size, np.float32)
        padded[:count] = scales
        return padded.reshape(blocks, groups, size)[:, group : group + 1]

    placed = place_shares((blocks, groups, size, width), 1, share)
    placed_scales = None if scales is None else place_shares((blocks, groups, size), 1, scales_of)
    return Shards(placed, placed_scales, jnp.int32(count))


def _scales(vectors: VectorStore) -> Float32[np.ndarray, " P"]:
    """The largest number of each vector becomes 127; a vector of zeros has the scale 1."""
    largest = np.concatenate([np.abs(block).max(axis=1) for block in vectors.blocks()])
    return np.where(largest > 0, largest / np.float32(127), np.float32(1))


def _check_room(needed: int, dtype: str) -> None:
    free = free_device_bytes()
    if free is not None and needed > free:
        smaller = "--search_on=host" if dtype == "int8" else "--device_dtype=int8 or --search_on=host"
        raise UserError(
            f"the passage vectors take {needed / 1e9:,.1f} GB on each device as {dtype}, where {free / 1e9:,.1f} GB "
            f"are free: choose {smaller}"
        )


_search = functools.partial(jax.jit, static_argnames=("k", "recall"))(search_on_device)


class DeviceIndex:
    """All inner products of queries with P vectors of width E, on the devices."""

    def __init__(self, vectors: np.ndarray | VectorStore, dtype: str = "float32", recall: float = 1.0):
        """An index over a store, or an array [P, E] float32, P >= 1; they have to stay as they are.

        dtype: how the devices hold them. recall: below 1: see `search_on_device`.

        Raises ValueError for another shape or type, UserError where the devices have no room for them.
        """
        self._vectors, self._dtype, self._recall = as_store(vectors), dtype, recall
        self._shards = place_vectors(self._vectors, dtype)

    def search(self, queries: Queries, k: int) -> Proposal:
        """Passage rows of each query: with float32 vectors the k best [B, k], exactly as exact search on the host has
        them, else [B, n] the n > k best by rounded scores (all P where there are no more).
        """
        began = time.perf_counter()
        if self._dtype == "float32" and self._recall == 1:
            rows = exact_rows(self._find, queries.vectors, self._vectors, k)
        else:
            rows = self._find(queries.vectors, min(4 * k + 32, len(self._vectors)))[1].astype(np.int64)
        flops = 2.0 * len(queries.vectors) * len(self._vectors) * self._vectors.width
        return Proposal(rows, Cost(time.perf_counter() - began, flops))

    def _find(self, queries: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows [B, n], some questions at a time: a power of two, so that few programs are compiled."""
        scores, rows = np.empty((len(queries), n), np.float32), np.empty((len(queries), n), np.int32)
        for start in range(0, len(queries), _QUERIES):
            asked = queries[start : start + _QUERIES]
            padded = np.zeros((1 << (len(asked) - 1).bit_length(), queries.shape[1]), np.float32)
            padded[: len(asked)] = asked
            found = _search(padded, self._shards, k=n, recall=self._recall)
            place = slice(start, start + len(asked))
            scores[place], rows[place] = (np.asarray(each)[: len(asked)] for each in found)
        return scores, rows

    def describe(self) -> dict[str, Any]:
        """What a run records of its index: type, how the vectors are held and searched, passages P, width E, bytes on
        all devices.
        """
        passages, width = len(self._vectors), self._vectors.width
        held = [each for each in (self._shards.vectors, self._shards.scales) if each is not None]
        return {
            "type": "DeviceIndex",
            "dtype": self._dtype,
            "recall": self._recall,
            "devices": device_count(),
            "passages": passages,
            "width": width,
            "bytes": sum(each.nbytes for each in held),
        }
