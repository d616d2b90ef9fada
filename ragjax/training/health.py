"""Whether a moving embedder still finds different, familiar and right passages for a fixed sample of dev questions.

An embedder that is trained through the answers can collapse: it then finds the same few passages for every question,
the generator learns to do without them, and the loss alone does not tell.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ragjax.data.questions import Question
from ragjax.evaluation import mean_recall
from ragjax.pipeline import Pipeline

SAMPLE = 100  # dev questions
_RECALL_K = 5
# Together they say collapse; each by itself also happens when training goes well.
_DISTINCT_FALL, _AGREEMENT, _RECALL_FALL = 0.7, 0.5, 0.8


class RetrievalHealth:
    """Compares what is found now with what the embedder found at the phase's start."""

    def __init__(self, pipeline: Pipeline, questions: Sequence[Question], top_k: int):
        self._pipeline, self._questions, self._top_k = pipeline, questions[:SAMPLE], top_k
        self._start_rows: np.ndarray | None = None
        self._start: dict[str, float] = {}

    def figures(self, embedder_variables: Mapping[str, Any]) -> dict[str, float]:
        """Of the embedder's given variables; {} where there are no dev questions.

        distinct_passages_per_100   different passages found for 100 questions, top k each (fewer questions: scaled)
        top_k_agreement             share of the start's top k that is still found
        recall_at_5                 over the questions with labelled passages; left out where there are none
        """
        if not self._questions:
            return {}
        if self._start_rows is None:
            self._start_rows = self._find(self._pipeline.embedder.params)
            self._start = self._measure(self._start_rows)
        return self._measure(self._find(embedder_variables["params"]))

    def has_collapsed(self, figures: Mapping[str, float]) -> bool:
        """Whether variety, agreement with the start and, where it is known, recall have fallen together."""
        if not figures:
            return False
        start, name = self._start, "recall_at_5"
        return (
            figures["distinct_passages_per_100"] <= _DISTINCT_FALL * start["distinct_passages_per_100"]
            and figures["top_k_agreement"] <= _AGREEMENT
            and (name not in figures or figures[name] <= _RECALL_FALL * start[name])
        )

    def _find(self, params: Mapping[str, Any]) -> np.ndarray:
        """[n, max(k, 5)] passage rows."""
        trained = self._pipeline.with_trained({"embedder": {"params": params}})
        width = min(max(self._top_k, _RECALL_K), len(trained.store))
        return trained.retrieve([question.question for question in self._questions], width).rows

    def _measure(self, rows: np.ndarray) -> dict[str, float]:
        top, start = rows[:, : self._top_k], self._start_rows[:, : self._top_k]
        kept = [len(set(now.tolist()) & set(then.tolist())) / len(then) for now, then in zip(top, start, strict=True)]
        recall = mean_recall(self._pipeline.store, self._questions, rows)
        figures = {
            "distinct_passages_per_100": 100.0 * len(np.unique(top)) / len(top),
            "top_k_agreement": float(np.mean(kept)),
        }
        return figures if recall is None else figures | {"recall_at_5": recall}
