"""The embedder's half of every batch: question vectors, the passages they find, and the layout of the questions."""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Int64

from ragjax.arrays import ModelVariables
from ragjax.costs import Cost, Ledger, forward_flops
from ragjax.data.batches import pad_tokens, round_up
from ragjax.embedding import embed
from ragjax.models.encoders import sentence_vectors
from ragjax.parallel import to_host
from ragjax.retrieval import Queries, Retrieval
from ragjax.runs import Run
from ragjax.training.sampling import QuestionBatch, Sampler, total_steps
from ragjax.training.signals.one_pass import OnePass
from ragjax.training.signals.signal import model_work

_TRIED = 200  # training questions that say how long the passages are which a phase finds

_embed_stacked = jax.jit(jax.vmap(sentence_vectors, in_axes=(None, 0, None, None)), static_argnums=0)


def tried_places(places: Sequence[int]) -> list[int]:
    """Some of a phase's training questions, from its first to its last."""
    return list(places[:: -(-len(places) // _TRIED)])


class QuestionSide:
    """What every assembler does with the questions of a batch."""

    def __init__(self, run: Run, sampler: Sampler, moves: bool):
        """sampler: all questions that will be assembled, for the bound on lengths. moves: the embedder is trained."""
        self._pipeline = run.pipeline
        self._top_k = run.config.top_k
        self._sampler, self._batch_size = sampler, sampler.batch_size
        self.layout = run.arrangement.layout(sampler.batch_size, run.config.gradient_accumulation)
        self.question_length = round_up(sampler.longest_question, 8)
        self._steps = total_steps(run.config, len(sampler.train), sampler.batch_size)
        self._one_pass = None if moves else OnePass(run.pipeline, sampler, self._top_k, self._steps)

    def tried(self) -> tuple[list[int], Int64[np.ndarray, "n K"]]:
        """Places of some training questions of the phase, and what they find before its first step, best first."""
        places = tried_places(self._sampler.asked(self._steps).tolist())
        if self._one_pass is not None:
            return places, self._one_pass.of_training(places)
        questions = [self._sampler.train[place].question for place in places]
        return places, self._pipeline.retrieve(questions, self._top_k).passage_rows

    def vectors(self, batch: QuestionBatch, variables: ModelVariables) -> np.ndarray:
        """[b, E] from the embedder's given variables."""
        padded, lengths = pad_tokens(batch.tokens, self._batch_size, self.question_length)
        found = embed(self._pipeline.embedder.module, variables["embedder"], padded, lengths)
        return to_host(found)[: len(batch.questions)]

    def stacked_vectors(self, batch: QuestionBatch, variables: ModelVariables) -> np.ndarray:
        """[copies * b, E] from stacked variables [copies, ...], copy by copy."""
        padded, lengths = pad_tokens(batch.tokens, self._batch_size, self.question_length)
        found = _embed_stacked(self._pipeline.embedder.module, variables["embedder"], padded, lengths)
        vectors = np.asarray(found)[:, : len(batch.questions)]
        # A copy that has diverged finds anything, for its own loss tells; the others go on.
        vectors = np.where(np.isfinite(vectors).all(axis=-1, keepdims=True), vectors, 0.0)
        return vectors.reshape(-1, vectors.shape[-1])

    def retrieve(self, batch: QuestionBatch, variables: ModelVariables, ledger: Ledger) -> Retrieval:
        """Passages of the questions, best first, by the embedder's given variables.

        An embedder that does not move has found them for all questions at once.
        """
        if self._one_pass is not None:
            return self._one_pass.retrieve(batch, ledger)
        return self._search(batch, lambda: self.vectors(batch, variables), 1, ledger)

    def retrieve_stacked(
        self, batch: QuestionBatch, variables: ModelVariables, copies: int, ledger: Ledger
    ) -> np.ndarray:
        """Passage rows [copies, b, K], best first, by stacked variables of the embedder."""
        found = self._search(batch, lambda: self.stacked_vectors(batch, variables), copies, ledger)
        return found.passage_rows.reshape(copies, len(batch.questions), -1)

    def _search(
        self, batch: QuestionBatch, make_vectors: Callable[[], np.ndarray], copies: int, ledger: Ledger
    ) -> Retrieval:
        """Passages of the questions, as often as there are copies of the embedder."""
        embedder = self._pipeline.embedder
        began = time.perf_counter()
        vectors = make_vectors()
        embedded = time.perf_counter()
        texts = [question.question for question in batch.questions] * copies
        found = self._pipeline.retriever.retrieve(Queries(texts, vectors), self._top_k)
        lengths = list(map(len, batch.tokens)) * copies
        ledger.add("embedder", Cost(embedded - began, forward_flops(embedder.size, lengths, 0), sum(lengths)))
        ledger.add("search", found.cost)
        return found

    def work(self, batch: QuestionBatch, training: bool) -> Cost:
        """The embedder's work inside a step."""
        return model_work(self._pipeline.embedder.size, list(map(len, batch.tokens)), 0, training)
