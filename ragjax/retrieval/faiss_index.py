"""Exact inner-product search over the passage vectors. The only file that imports FAISS.

FAISS adds up in float32, in an order that depends on the number of queries, so that its scores differ in the
last bits and passages of equal text may come in any order. Here FAISS proposes, and the candidates are scored
again in float64: the result does not depend on how queries are batched, and among equal scores the lower row
comes first. FAISS is imported where it is used: what needs no index runs where there is no FAISS.
"""

import time
from typing import Any

import numpy as np

from ragjax.costs import Cost
from ragjax.retrieval.retriever import Proposal, Queries
from ragjax.retrieval.vectors import best_first, check_vectors

_SPARE = 8  # candidates beyond k that are asked for at first


class ExactIndex:
    """All inner products of queries with P vectors of width E."""

    def __init__(self, vectors: np.ndarray):
        """vectors: [P, E] float32, P >= 1; they are copied. Raises ValueError for another shape or type."""
        check_vectors(vectors)
        import faiss

        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)  # in one piece: FAISS would double its storage on the way
        # FAISS's own storage seen as an array.
        self._vectors = faiss.rev_swig_ptr(self._index.get_xb(), vectors.size).reshape(vectors.shape)
        longest = float(np.sqrt(np.einsum("pe,pe->p", self._vectors, self._vectors).max()))
        # Bound of |float32 score - exact score| / |query|: one unit of rounding per addend, and one for the
        # result.
        self._rounding = (vectors.shape[1] + 1) * 2.0**-24 * longest

    def search(self, queries: Queries, k: int) -> Proposal:
        """The k best passage rows of each query [B, k], best first; of equal scores the lower row comes first, also at
        the k-th place.
        """
        began = time.perf_counter()
        vectors, (count, width) = queries.vectors, self._vectors.shape
        passage_rows = np.empty((len(vectors), k), np.int64)
        open_places, asked = np.arange(len(vectors)), min(k + _SPARE, count)
        while len(open_places):
            proposed_scores, proposed_rows = self._index.search(vectors[open_places], asked)
            unsettled = []
            for place, candidates, last in zip(open_places, proposed_rows, proposed_scores[:, -1], strict=True):
                query = vectors[place]
                passage_rows[place], exact = best_first(query, candidates, self._vectors[candidates], k)
                # Nothing outside the candidates scores above `last` plus rounding: can it reach the k-th
                # place?
                slack = 2 * self._rounding * float(np.linalg.norm(query))
                if asked < count and exact[-1] <= last + slack:
                    unsettled.append(place)
            open_places, asked = np.array(unsettled, np.int64), min(4 * asked, count)
        return Proposal(passage_rows, Cost(time.perf_counter() - began, 2.0 * len(vectors) * count * width))

    def describe(self) -> dict[str, Any]:
        """What a run records of its index: type, FAISS version, passages P, width E, bytes of the vectors in
        memory.
        """
        import faiss

        passages, width = self._vectors.shape
        return {
            "type": "IndexFlatIP",
            "faiss": faiss.__version__,
            "passages": passages,
            "width": width,
            "bytes": self._vectors.nbytes,
        }
