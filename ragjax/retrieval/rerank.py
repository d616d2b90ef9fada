"""A second look at what a search has found, by something too slow to look at all passages."""

import time
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from ragjax.costs import Cost
from ragjax.data.passages import PassageStore
from ragjax.data.questions import Passage
from ragjax.retrieval.retriever import Proposal, Queries, Retriever


@runtime_checkable
class Reranker(Protocol):
    """Something that reads a question and a passage together."""

    def score(self, questions: Sequence[str], passages: Sequence[Passage]) -> tuple[Float[np.ndarray, " n"], Cost]:
        """How well each of n passages serves the question beside it, higher is better; and what that cost."""

    def describe(self) -> dict[str, Any]:
        """What a run records of it; "type" is its name."""


class RerankedIndex:
    """Proposes the k passages that a re-ranker puts first among the top N of another search.

    A pair of question and passage is scored once: a re-ranker is not trained, so its scores hold for the whole run.
    """

    def __init__(self, candidates: Retriever, store: PassageStore, reranker: Reranker, top: int):
        """candidates: finds them. store: its passages. top: N; where more passages are asked for, so many."""
        self._candidates, self._store, self._reranker, self._top = candidates, store, reranker, top
        self._known: dict[tuple[str, int], float] = {}

    def search(self, queries: Queries, k: int) -> Proposal:
        """Exactly k passages a question; of equal scores the one that is nearer by its vector."""
        found = self._candidates.retrieve(queries, min(max(self._top, k), len(self._candidates.vectors)))
        began = time.perf_counter()
        pairs = [
            [(text, int(row)) for row in rows] for text, rows in zip(queries.texts, found.passage_rows, strict=True)
        ]
        work = self._learn(list(dict.fromkeys(pair for group in pairs for pair in group if pair not in self._known)))
        scores = np.array([[self._known[pair] for pair in group] for group in pairs]).reshape(found.passage_rows.shape)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        spent = Cost(time.perf_counter() - began, work.flops, work.tokens)
        return Proposal(np.take_along_axis(found.passage_rows, order, axis=1), found.cost + spent)

    def _learn(self, pairs: Sequence[tuple[str, int]]) -> Cost:
        """Scores pairs of question and passage row; what that cost."""
        if not pairs:
            return Cost()
        scores, cost = self._reranker.score([text for text, _ in pairs], [self._store[row] for _, row in pairs])
        self._known.update(zip(pairs, map(float, scores), strict=True))
        return cost

    def describe(self) -> dict[str, Any]:
        """What a run records of its index: type, N, the re-ranker, and where the candidates come from."""
        parts = {"reranker": self._reranker.describe(), "candidates": self._candidates.index.describe()}
        return {"type": "reranked", "top": self._top, **parts}
