"""What a frozen embedder finds for the questions of a phase: all of them are searched at once, when the first is asked.

Questions are embedded and searched in the same batches whatever step asks first, so a resumed run finds the same.
"""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64

from ragjax.costs import Cost, Ledger, forward_flops
from ragjax.data.questions import Question
from ragjax.pipeline import Pipeline
from ragjax.retrieval import Queries, Retrieval
from ragjax.training.sampling import QuestionBatch, Sampler
from ragjax.voice import progress

_AT_ONCE = 4096  # questions, whose tokens and vectors are in memory together
_SHOWN = 1000  # questions that are worth a progress bar


@dataclasses.dataclass(frozen=True)
class _Found:
    """What was found for n questions of a split."""

    places: Int64[np.ndarray, " n"]  # theirs in the split, ascending
    passage_rows: Int64[np.ndarray, "n K"]
    scores: Float32[np.ndarray, "n K"]
    embedding_seconds: float
    search: Cost


class OnePass:
    """Passages of every question that a phase asks for."""

    def __init__(self, pipeline: Pipeline, sampler: Sampler, top_k: int, steps: int):
        """steps: of the phase; those of its first epoch say which training questions it will ask for."""
        self._pipeline, self._sampler, self._top_k, self._steps = pipeline, sampler, top_k, steps
        self._found: dict[str, _Found] = {}

    def retrieve(self, batch: QuestionBatch, ledger: Ledger) -> Retrieval:
        """Passages of a batch, best first.

        The ledger is charged with a question's share the first time that it is asked, also where a run was resumed
        since and has searched again.
        """
        split = "train" if batch.training else "dev"
        found = self._of(split)
        if not np.isin(batch.indices, found.places).all():  # a question of none of the phase's steps
            found = self._found[split] = self._search(split, np.arange(len(self._sampler.train)))
        if self._sampler.epoch(batch.step) == 0 if batch.training else batch.step == 0:
            self._charge(batch, found, ledger)
        asked = np.searchsorted(found.places, batch.indices)
        return Retrieval(found.passage_rows[asked], found.scores[asked])

    def of_training(self, places: Sequence[int]) -> Int64[np.ndarray, "n K"]:
        """Passages of some training questions that the phase asks for, best first, charged to nobody yet."""
        found = self._of("train")
        return found.passage_rows[np.searchsorted(found.places, places)]

    def _of(self, split: str) -> _Found:
        if split not in self._found:
            places = self._sampler.asked(self._steps) if split == "train" else np.arange(len(self._sampler.dev))
            self._found[split] = self._search(split, places)
        return self._found[split]

    def _charge(self, batch: QuestionBatch, found: _Found, ledger: Ledger) -> None:
        share, lengths = len(batch.questions) / len(found.places), list(map(len, batch.tokens))
        flops = forward_flops(self._pipeline.embedder.size, lengths, 0)
        ledger.add("embedder", Cost(share * found.embedding_seconds, flops, sum(lengths)))
        ledger.add("search", Cost(share * found.search.seconds, share * found.search.flops))

    def _search(self, split: str, places: Int64[np.ndarray, " n"]) -> _Found:
        questions: Sequence[Question] = self._sampler.train if split == "train" else self._sampler.dev
        embedder, retriever = self._pipeline.embedder, self._pipeline.retriever
        rows = np.empty((len(places), self._top_k), np.int64)
        scores = np.empty(rows.shape, np.float32)
        seconds, search = 0.0, Cost()
        with progress(total=len(places), desc="searching", unit=" questions", shown=len(places) >= _SHOWN) as bar:
            for start in range(0, len(places), _AT_ONCE):
                texts = [questions[place].question for place in places[start : start + _AT_ONCE].tolist()]
                began = time.perf_counter()
                vectors = embedder.encode_queries(texts)
                seconds += time.perf_counter() - began
                found = retriever.retrieve(Queries(texts, vectors), self._top_k)
                chunk = slice(start, start + len(texts))
                rows[chunk], scores[chunk] = found.passage_rows, found.scores
                search += found.cost
                bar.update(len(texts))
        return _Found(places, rows, scores, seconds, search)
