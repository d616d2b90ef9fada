"""What an embedder finds for the dev questions while it moves: right, different and familiar passages.

An embedder that is trained through the answers can collapse: it then finds the same few passages for every question,
the generator learns to do without them, and the loss alone does not tell.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ragjax import metrics
from ragjax.arrays import Tree, Variables
from ragjax.data.questions import Question
from ragjax.pipeline import Pipeline

# Dev questions whose passages are looked up: no generator reads them, so this is cheap.
WATCHED = 1000
# The first of them, over which passages are counted as different.
SAMPLE = 100
RECALL_K, RANK_K = 5, 10
# Together they say collapse; each by itself also happens when training goes well.
_DISTINCT_FALL, _AGREEMENT, _RECALL_FALL = 0.7, 0.5, 0.8


@dataclasses.dataclass(frozen=True)
class Found:
    """What one state of the embedder finds."""

    figures: Mapping[str, float]  # {} where there are no dev questions
    recalls: np.ndarray  # [n], Recall@5 of each labelled question


class RetrievalHealth:
    """Compares what is found now with what the embedder found at the phase's start."""

    def __init__(self, pipeline: Pipeline, questions: Sequence[Question], top_k: int, start: Pipeline | None = None):
        """start: what the phase begins with, where the passages' vectors of `pipeline` move."""
        self._pipeline, self._questions, self._top_k = pipeline, questions[:WATCHED], top_k
        self._start = start or pipeline

    @functools.cached_property
    def start(self) -> Found:
        """What the embedder found before it moved."""
        return self._measure(self._start_rows)

    @functools.cached_property
    def _start_rows(self) -> dict[int, np.ndarray]:
        return self._find(self._start, self._start.embedder.params)

    def measure(self, embedder_variables: Variables) -> Found:
        """Of the embedder's given variables. Its figures:

        distinct_passages_per_100    different passages found for 100 questions, top k each (fewer questions: scaled)
        top_k_agreement              share of the start's top k that is still found
        recall_at_5, mrr_at_10       over the questions with labelled passages; left out where there are none
        """
        if not self._questions:
            return Found({}, np.empty(0))
        return self._measure(self._find(self._pipeline, embedder_variables["params"]))

    def has_collapsed(self, figures: Mapping[str, float]) -> bool:
        """Whether variety, agreement with the start and, where it is known, recall have fallen together."""
        if not figures:
            return False
        start, name = self.start.figures, "recall_at_5"
        return (
            figures["distinct_passages_per_100"] <= _DISTINCT_FALL * start["distinct_passages_per_100"]
            and figures["top_k_agreement"] <= _AGREEMENT
            and (name not in figures or figures[name] <= _RECALL_FALL * start[name])
        )

    def _find(self, pipeline: Pipeline, params: Tree) -> dict[int, np.ndarray]:
        """Passage rows [n, k] for each k that is looked at, or [n, P] where there are fewer passages."""
        trained = pipeline.with_trained({"embedder": {"params": params}})
        within = {k: min(k, len(trained.store)) for k in (self._top_k, RECALL_K, RANK_K)}
        found = trained.retrieve_each([question.question for question in self._questions], within.values())
        return {k: found[count].passage_rows for k, count in within.items()}

    def _measure(self, rows: dict[int, np.ndarray]) -> Found:
        top, start = rows[self._top_k][:SAMPLE], self._start_rows[self._top_k][:SAMPLE]
        kept = [len(set(now.tolist()) & set(then.tolist())) / len(then) for now, then in zip(top, start, strict=True)]
        figures = {
            "distinct_passages_per_100": 100.0 * len(np.unique(top)) / len(top),
            "top_k_agreement": float(np.mean(kept)),
        }
        labelled = [i for i, question in enumerate(self._questions) if question.positive_ids]

        def scored(metric: Callable[..., float | None], k: int) -> np.ndarray:
            ids_of, asked = self._pipeline.store.ids_of, self._questions
            return np.array([metric(ids_of(rows[k][i]), asked[i].positive_ids, k) for i in labelled], np.float64)

        recalls = scored(metrics.recall_at_k, RECALL_K)
        if labelled:
            ranks = scored(metrics.reciprocal_rank, RANK_K)
            figures |= {"recall_at_5": float(recalls.mean()), "mrr_at_10": float(ranks.mean())}
        return Found(figures, recalls)
