"""Exact search by a way of finding that rounds.

Whatever adds up in float32 does so in an order of its own, so its scores differ in the last bits and passages of equal
text may come in any order. Here such a way only finds candidates, and they are scored again in float64: the result does
not depend on how queries are batched, and among equal scores the lower row comes first.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Int, Int64

from ragjax.retrieval.vectors import VectorStore, best_first

_SPARE = 8  # candidates beyond k that are asked for at first

# (queries [b, E], n) -> float32 scores [b, n] of the n best passages of each query, best first, and their rows.
Find = Callable[[np.ndarray, int], tuple[Float32[np.ndarray, "b n"], Int[np.ndarray, "b n"]]]


def exact_rows(
    find: Find, queries: Float32[np.ndarray, "B E"], vectors: VectorStore, longest: float, k: int
) -> Int64[np.ndarray, "B k"]:
    """The k best passage rows of each query, best first; of equal scores the lower row, also at the k-th place.

    Args:
      find: finds candidates by float32 sums of products.
      queries: the questions' vectors.
      vectors: the passages'.
      longest: no passage's vector is longer.
      k: at most P.
    """
    count, width = len(vectors), vectors.width
    # Bound of |float32 score - exact score| / |query|: one unit of rounding per addend, and one for the result.
    rounding = (width + 1) * 2.0**-24 * longest
    passage_rows = np.empty((len(queries), k), np.int64)
    open_places, asked = np.arange(len(queries)), min(k + _SPARE, count)
    while len(open_places):
        scores, rows = find(queries[open_places], asked)
        unsettled = []
        for place, candidates, last in zip(open_places, rows, scores[:, -1], strict=True):
            query = queries[place]
            passage_rows[place], exact = best_first(query, candidates, vectors.vectors_of(candidates), k)
            # Nothing outside the candidates scores above `last` plus rounding: can it reach the k-th place?
            slack = 2 * rounding * float(np.linalg.norm(query))
            if asked < count and exact[-1] <= last + slack:
                unsettled.append(place)
        open_places, asked = np.array(unsettled, np.int64), min(4 * asked, count)
    return passage_rows


def longest_of(vectors: Float32[np.ndarray, "P E"], at_once: int = 1 << 16) -> float:
    """The length of the longest vector; a memory map is read piece by piece."""
    pieces = (vectors[start : start + at_once] for start in range(0, len(vectors), at_once))
    return float(np.sqrt(max(np.einsum("pe,pe->p", piece, piece).max() for piece in pieces)))
