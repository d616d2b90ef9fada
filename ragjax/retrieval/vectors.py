"""Stored passage vectors by row number, and the scores that follow from them."""

import functools
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int


@runtime_checkable
class VectorStore(Protocol):
    """The vectors [P, E] of a corpus's passages, float32, in the order of its rows."""

    def __len__(self) -> int:
        """P."""

    @property
    def width(self) -> int:
        """E."""

    @property
    def longest(self) -> float:
        """The length of the longest vector."""

    def vectors_of(self, passage_rows: Sequence[int] | Int[np.ndarray, "*rows"]) -> Float32[np.ndarray, "*rows E"]:
        """Vectors of the passages, a copy.

        Raises IndexError for a row outside 0..P-1.
        """

    def blocks(self) -> Iterator[Float32[np.ndarray, "n E"]]:
        """All vectors in the order of their rows, piece by piece: they need not fit into memory together."""


class ArrayVectors:
    """Vectors in an array, which may be a memory map: then only what is asked for is read."""

    def __init__(self, vectors: np.ndarray):
        """Keeps `vectors` [P, E] float32, P >= 1, without a copy. Raises ValueError for another shape or type."""
        check_vectors(vectors)
        self._vectors = vectors

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def width(self) -> int:
        return self._vectors.shape[1]

    @functools.cached_property
    def longest(self) -> float:
        return longest_of(self._vectors)

    def vectors_of(self, passage_rows: Sequence[int] | Int[np.ndarray, "*rows"]) -> Float32[np.ndarray, "*rows E"]:
        rows = np.asarray(passage_rows, np.int64)
        if rows.size and rows.min() < 0:  # would count from the end
            raise IndexError("passage rows start at 0")
        return self._vectors[rows]

    def blocks(self) -> Iterator[Float32[np.ndarray, "n E"]]:
        yield self._vectors


class MovingVectors(ArrayVectors):
    """Vectors in memory that can be replaced all together; who holds the store then sees the new ones."""

    def __init__(self, first: VectorStore):
        """Begins with a copy of these."""
        super().__init__(np.concatenate(list(first.blocks())))
        self.first = first

    def replace(self, vectors: Float32[np.ndarray, "P E"]) -> None:
        """Raises ValueError for another shape."""
        if vectors.shape != self._vectors.shape:
            raise ValueError(f"vectors must be {list(self._vectors.shape)}, not {list(vectors.shape)}")
        self._vectors = vectors
        self.__dict__.pop("longest", None)  # of those before

    @property
    def now(self) -> Float32[np.ndarray, "P E"]:
        """All of them, without a copy."""
        return self._vectors


def at_first(vectors: VectorStore) -> VectorStore:
    """The vectors before they moved, if they do."""
    return vectors.first if isinstance(vectors, MovingVectors) else vectors


def as_store(vectors: np.ndarray | VectorStore) -> VectorStore:
    """A store as it is; an array [P, E] float32 as one. Raises ValueError for an array of another shape or type."""
    return ArrayVectors(vectors) if isinstance(vectors, np.ndarray) else vectors


def check_vectors(vectors: np.ndarray) -> None:
    """Raises ValueError unless they are float32 [P, E] with P, E >= 1."""
    if vectors.ndim != 2 or 0 in vectors.shape or vectors.dtype != np.float32:
        raise ValueError(f"vectors must be float32 [P, E], not {vectors.dtype} {list(vectors.shape)}")


def longest_of(vectors: Float32[np.ndarray, "n E"]) -> float:
    """The length of the longest of them."""
    return float(np.sqrt(np.einsum("ne,ne->n", vectors, vectors).max()))


def best_first(
    query: Float32[np.ndarray, " E"],
    passage_rows: Int[np.ndarray, " n"],
    vectors: Float32[np.ndarray, "n E"],
    k: int,
) -> tuple[Int[np.ndarray, " k"], Float32[np.ndarray, " k"]]:
    """The k of n passages with the highest inner products: (passage rows, scores), best first.

    The result does not depend on the order in which the passages are given; of equal scores the lower row comes
    first.

    Args:
      query: the question's vector.
      passage_rows: the passages.
      vectors: theirs.
      k: at most n.
    """
    # In float64, an elementwise product and a sum along the row: equal vectors get equal sums, which a BLAS product of
    # a matrix does not promise. Rounded to float32 before the order is taken, so that the order is that of the scores
    # shown.
    scores = (vectors.astype(np.float64) * query).sum(axis=1).astype(np.float32)
    order = np.lexsort((passage_rows, -scores))[:k]
    return passage_rows[order], scores[order]
