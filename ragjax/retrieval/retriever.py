"""From questions to passages: an index proposes passage rows, and the stored vectors say how near each of them is.

p(z|x) is defined by the question's vector and the passages' stored ones. An index may be approximate, lexical or a
mixture, so whatever it ranks by goes no further than its choice of passages: scores and order are computed here.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from ragjax.costs import Cost
from ragjax.errors import DivergedError, UserError
from ragjax.parallel import process_count, share_out
from ragjax.retrieval.vectors import VectorStore, best_first


@dataclass(frozen=True)
class Queries:
    """B questions, in both forms that an index may read."""

    texts: Sequence[str]  # [B]
    vectors: np.ndarray  # [B, E] float; the retriever refuses another shape


@dataclass(frozen=True)
class Proposal:
    """What an index has found for B questions."""

    passage_rows: Int64[np.ndarray, "B n"]  # n >= k, no row twice for a question; their order means nothing
    cost: Cost  # of the search: its seconds and FLOPs


@runtime_checkable
class Index(Protocol):
    """Something that finds passages."""

    def search(self, queries: Queries, k: int) -> Proposal:
        """At least k passages for each question. 1 <= k <= P, and the vectors are finite: the retriever sees to it."""

    def describe(self) -> dict[str, Any]:
        """What a run records of its index; "type" is its name."""


@dataclass(frozen=True)
class Retrieval:
    """Passages of B questions, best first."""

    passage_rows: Int64[np.ndarray, "B k"]  # row numbers in the corpus
    scores: Float32[np.ndarray, "B k"]  # inner products
    cost: Cost = Cost()  # seconds and FLOPs of the search


@dataclass(frozen=True)
class Retriever:
    """An index over a corpus, and the corpus's vectors [P, E]."""

    index: Index
    vectors: VectorStore
    # Whether the k best are the first k of more: not where an index ranks by something else than the vectors.
    nested: bool = True
    # Whether processes share out the questions, each of which gets all; not where an index asks, for its own part.
    shared: bool = False

    def retrieve(self, queries: Queries, k: int) -> Retrieval:
        """The k best passages that the index proposes, by inner product; of equal scores the lower row comes first.

        The FLOPs are the index's: those of k inner products a question do not count beside them.

        Raises:
          UserError: k is not in 1..P, or a question's vector is not finite.
          ValueError: the vectors have another shape; the index proposes fewer than k passages, or one twice.
        """
        vectors = self._checked(queries, k)
        if not self.shared or process_count() == 1:
            return Retrieval(*self._search(Queries(queries.texts, vectors), k))
        began, count = time.perf_counter(), len(vectors)

        def part(chosen: slice) -> tuple[np.ndarray, ...]:
            rows, scores, cost = self._search(Queries(queries.texts[chosen], vectors[chosen]), k)
            work = np.array([cost.flops, cost.tokens]) / max(len(rows), 1)
            return rows, scores, np.tile(work, (len(rows), 1))

        rows, scores, work = share_out(part, count)
        flops, tokens = work.sum(axis=0).tolist()
        return Retrieval(rows, scores, Cost(time.perf_counter() - began, flops, round(tokens)))

    def _search(self, queries: Queries, k: int) -> tuple[Int64[np.ndarray, "B k"], Float32[np.ndarray, "B k"], Cost]:
        """Passage rows and their scores, best first, of questions that may be none."""
        count = len(queries.texts)
        passage_rows, scores = np.empty((count, k), np.int64), np.empty((count, k), np.float32)
        if not count:
            return passage_rows, scores, Cost()
        found = self.index.search(queries, k)
        began = time.perf_counter()
        if found.passage_rows.shape[1] < k:
            raise ValueError(f"the index proposed {found.passage_rows.shape[1]} passages where {k} were asked for")
        for place, (query, proposed) in enumerate(zip(queries.vectors, found.passage_rows, strict=True)):
            passage_rows[place], scores[place] = best_first(query, proposed, self.vectors.vectors_of(proposed), k)
        if (np.diff(passage_rows, axis=1) == 0).any():  # equal rows have equal scores, so they are neighbours
            raise ValueError("the index proposed a passage twice, which would count double in p(z|x)")
        return passage_rows, scores, found.cost + Cost(time.perf_counter() - began)

    def retrieve_each(self, queries: Queries, counts: Iterable[int]) -> dict[int, Retrieval]:
        """What `retrieve` finds for each k of `counts`, the largest first; one search, whose cost is the first's, where
        that gives them all.
        """
        wanted = sorted(set(counts), reverse=True)
        if not self.nested:
            return {k: self.retrieve(queries, k) for k in wanted}
        found = self.retrieve(queries, wanted[0])
        return {
            k: Retrieval(found.passage_rows[:, :k], found.scores[:, :k], Cost() if place else found.cost)
            for place, k in enumerate(wanted)
        }

    def _checked(self, queries: Queries, k: int) -> Float32[np.ndarray, "B E"]:
        """The questions' vectors, contiguous."""
        count, width = len(self.vectors), self.vectors.width
        vectors = np.ascontiguousarray(queries.vectors, np.float32)
        if vectors.shape != (len(queries.texts), width):
            raise ValueError(f"question vectors must be [{len(queries.texts)}, {width}], not {list(vectors.shape)}")
        if not 1 <= k <= count:
            raise UserError(f"--top_k={k} does not fit a corpus of {count} passages: choose 1 to {count}")
        if not np.isfinite(vectors).all():
            raise DivergedError("a question vector is not finite: the embedder has diverged, lower --embedder_lr")
        return vectors
