"""Search by meaning and by words at once: reciprocal-rank fusion (Cormack, Clarke and Buettcher 2009)."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from ragjax.costs import Cost
from ragjax.retrieval.bm25 import Bm25Index
from ragjax.retrieval.retriever import Proposal, Queries, Retriever

_CONSTANT = 60  # of Cormack et al.
_DEPTH = 100  # passages of each ranking that are fused


class HybridIndex:
    """Proposes exactly the k passages that stand highest in the fused ranking of vectors and words."""

    def __init__(self, dense: Retriever, words: Bm25Index):
        self._dense, self._words = dense, words

    def search(self, queries: Queries, k: int) -> Proposal:
        """A passage's score is the sum of 1 / (60 + rank) over the two rankings, as far as it is among the first 100
        (or k) there; with words, only if it shares one. Of equal sums the one that is nearer by its vector stands
        higher.
        """
        depth = min(max(_DEPTH, k), len(self._dense.vectors))
        near = self._dense.retrieve(queries, depth)
        began = time.perf_counter()
        rankings = zip(near.passage_rows, self._words.rankings(queries.texts, depth), strict=True)
        rows = [fused(pair)[:k] for pair in rankings]
        found = np.array(rows, np.int64).reshape(len(queries.texts), k)
        return Proposal(found, near.cost + Cost(time.perf_counter() - began))

    def describe(self) -> dict[str, Any]:
        """What a run records of its index: type, how it is fused, and its two parts."""
        parts = {"dense": self._dense.index.describe(), "words": self._words.describe()}
        return {"type": "hybrid", "constant": _CONSTANT, "depth": _DEPTH, **parts}


def fused(rankings: Sequence[Int[np.ndarray, " _"]]) -> Int64[np.ndarray, " m"]:
    """All rows of the rankings (each best first) by their sum of 1 / (60 + rank); of equal sums the one met first."""
    sums: dict[int, float] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking.tolist(), start=1):
            sums[row] = sums.get(row, 0.0) + 1 / (_CONSTANT + rank)
    return np.array(sorted(sums, key=lambda row: -sums[row]), np.int64)
