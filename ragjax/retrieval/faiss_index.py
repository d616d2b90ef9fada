"""Exact inner-product search over the passage vectors. The only file that imports FAISS.

FAISS proposes, and `exact.py` settles what rounding leaves open. FAISS is imported where it is used: what needs no
index runs where there is no FAISS.
"""

import time
from typing import Any

import numpy as np

from ragjax.costs import Cost
from ragjax.retrieval.exact import exact_rows, longest_of
from ragjax.retrieval.retriever import Proposal, Queries
from ragjax.retrieval.vectors import ArrayVectors, check_vectors


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
        self._longest = longest_of(self._vectors)

    def search(self, queries: Queries, k: int) -> Proposal:
        """The k best passage rows of each query [B, k], best first; of equal scores the lower row comes first, also at
        the k-th place.
        """
        began = time.perf_counter()
        passage_rows = exact_rows(self._index.search, queries.vectors, ArrayVectors(self._vectors), self._longest, k)
        flops = 2.0 * len(queries.vectors) * self._vectors.size
        return Proposal(passage_rows, Cost(time.perf_counter() - began, flops))

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
