"""Two searches a question, for answers that rest on two passages: the second one knows what the first has found.

The question and the best passage of the first search make the text of the second, as in multi-hop dense retrieval
(Xiong et al. 2021). The embedder reads it as it was when the passages were encoded: while it is trained, the question's
own vector moves, and the second search follows it only by the passage that the first one finds.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int64

from ragjax.costs import Cost
from ragjax.data.passages import PassageStore
from ragjax.retrieval.retriever import Proposal, Queries, Retriever

# n texts -> their vectors as questions, and what that costs.
EncodeQueries = Callable[[Sequence[str]], tuple[Float[np.ndarray, "n E"], Cost]]


class TwoHopIndex:
    """Proposes half of the passages from each search."""

    def __init__(self, single: Retriever, store: PassageStore, encode: EncodeQueries):
        """single: what each search asks. store: its passages. encode: makes the second search's vectors."""
        self._single, self._store, self._encode = single, store, encode

    def search(self, queries: Queries, k: int) -> Proposal:
        """The first ceil(k / 2) passages of the first search, then as many of the second, by rank, as are missing and
        not among them.
        """
        first = self._single.retrieve(queries, k)
        began = time.perf_counter()
        best = [self._store[row].embedder_text for row in first.passage_rows[:, 0]]
        texts = [f"{question} {passage}" for question, passage in zip(queries.texts, best, strict=True)]
        vectors, encoding = self._encode(texts)
        seconds = time.perf_counter() - began
        second = self._single.retrieve(Queries(texts, vectors), k)
        kept = first.passage_rows[:, : (k + 1) // 2]
        rows = [joined(one, other, k) for one, other in zip(kept, second.passage_rows, strict=True)]
        work = Cost(seconds, encoding.flops, encoding.tokens)
        return Proposal(np.array(rows, np.int64).reshape(-1, k), first.cost + work + second.cost)

    def describe(self) -> dict[str, Any]:
        """What a run records of its index: type, and what each search asks."""
        return {"type": "two hops", "single": self._single.index.describe()}


def joined(first: Int[np.ndarray, " m"], second: Int[np.ndarray, " k"], k: int) -> Int64[np.ndarray, " k"]:
    """k rows: all of `first`, then those of `second`, in order, that are not there."""
    return np.concatenate([first, second[~np.isin(second, first)]])[:k].astype(np.int64)
