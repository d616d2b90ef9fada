"""Batches for multiple negatives ranking: each question's positive among the whole step's passages.

Passage vectors are frozen, so a step's candidates are plain numbers that every group and micro-batch gets in full: the
loss depends neither on the number of groups nor on how the step is split, and a larger batch costs the question side
only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ragjax.costs import Cost, Ledger
from ragjax.data.batches import RankingBatch, pad_tokens
from ragjax.data.questions import Question
from ragjax.errors import UserError
from ragjax.retrieval import Queries
from ragjax.runs import Run
from ragjax.training.assembly import Asked, Assembled, NoCache, QuestionSide, dev_questions
from ragjax.training.objectives import RankingObjective

Tree = Mapping[str, Any]


class RankingAssembler(NoCache):
    """Batches of labelled questions; unlabelled ones are skipped (`skipped` counts those of the training split)."""

    def __init__(self, run: Run):
        """Raises UserError where no training question is labelled, or more hard negatives are asked for than exist."""
        config, pipeline, dataset = run.config, run.pipeline, run.dataset
        self.questions = [question for question in dataset.train if question.positive_ids]
        self.dev = [question for question in dev_questions(run) if question.positive_ids]
        self.skipped = len(dataset.train) - len(self.questions)
        if not self.questions:
            raise UserError(
                f"no training question of {dataset.name} has positive_ids, which --strategy={config.strategy} learns "
                "from: label some, or choose --strategy=two_phase."
            )
        self.batch_size = config.ranking_batch_size
        self.objective = RankingObjective(pipeline.embedder.module, config.ranking_scale)
        self._config, self._pipeline = config, pipeline
        everything = [*self.questions, *self.dev]
        self.side = QuestionSide(run, everything, self.batch_size)
        self._positives = {q.id: set(pipeline.store.rows_of(q.positive_ids).tolist()) for q in everything}
        # The untrained embedder's question vectors: hard negatives and the filter are its, not the moving one's.
        self._guide: dict[str, np.ndarray] = {}
        self._hard: dict[str, list[int]] = {}
        if config.hard_negatives or config.negative_filter == "gist":
            vectors = pipeline.embedder.encode_queries([question.question for question in everything])
            self._guide = {question.id: vector for question, vector in zip(everything, vectors, strict=True)}
        if config.hard_negatives:
            self._hard = self._find_hard_negatives(everything)

    def _find_hard_negatives(self, questions: Sequence[Question]) -> dict[str, list[int]]:
        wanted, most = self._config.hard_negatives, max(map(len, self._positives.values()))
        passages = len(self._pipeline.store)
        if wanted + most > passages:
            raise UserError(
                f"--hard_negatives={wanted} are more than the {passages} passages hold besides the positives: lower it."
            )
        queries = Queries([q.question for q in questions], np.stack([self._guide[q.id] for q in questions]))
        rows = self._pipeline.retriever.retrieve(queries, wanted + most).rows
        return {
            question.id: [int(row) for row in found if int(row) not in self._positives[question.id]][:wanted]
            for question, found in zip(questions, rows, strict=True)
        }

    def assemble(self, asked: Asked, embedder_variables: Tree, ledger: Ledger) -> Assembled:
        questions, _, step, training = asked
        epoch = step // -(-len(self.questions) // self.batch_size) if training else 0
        positives = [self._positive(question, epoch) for question in questions]
        negatives = [row for question in questions for row in self._hard.get(question.id, [])]
        candidates = np.asarray([*positives, *negatives], np.int64)
        # One shape for every step, the last one of an epoch too.
        size = self.batch_size * (1 + self._config.hard_negatives)
        vectors = self._pipeline.retriever.vectors.vectors_of(candidates)
        mask = np.zeros((len(questions), size), bool)
        mask[:, : len(candidates)] = self._is_negative(questions, positives, candidates, vectors)
        padded = np.zeros((size, vectors.shape[1]), np.float32)
        padded[: len(candidates)] = vectors
        tokens = self.side.tokens(questions)

        def make(places: Sequence[int]) -> RankingBatch:
            filled = np.zeros((self.side.layout.size, size), bool)
            filled[: len(places)] = mask[places]
            labels = np.zeros(self.side.layout.size, np.int32)
            labels[: len(places)] = places
            question_tokens, lengths = pad_tokens(
                [tokens[place] for place in places], self.side.layout.size, self.side.question_length
            )
            return RankingBatch(question_tokens, lengths, padded, labels, filled)

        batch = self.side.layout.stack(list(range(len(questions))), make)
        figures = {"candidates": len(set(candidates.tolist()))}
        return Assembled(batch, {"embedder": self.side.work(questions, training)}, figures)

    def assemble_stacked(
        self, asked: Asked, stacked_variables: Tree, copies: int, ledger: Ledger
    ) -> tuple[list[RankingBatch], Cost]:
        """The same batch for each copy of the embedder, and the work that one of them is in a step."""
        assembled = self.assemble(asked, stacked_variables, ledger)
        return [assembled.batch] * copies, assembled.work["embedder"]

    def _positive(self, question: Question, epoch: int) -> int:
        """The one labelled passage of this epoch, drawn by seed."""
        choices = sorted(self._positives[question.id])
        draw = np.random.default_rng((self._config.seed, epoch, *question.id.encode()))
        return choices[int(draw.integers(len(choices)))]

    def _is_negative(
        self, questions: Sequence[Question], positives: Sequence[int], candidates: np.ndarray, vectors: np.ndarray
    ) -> np.ndarray:
        """[b, P]: whether a candidate counts as a negative of a question."""
        negative = np.stack([~np.isin(candidates, list(self._positives[question.id])) for question in questions])
        if self._config.negative_filter == "gist":
            guide = np.stack([self._guide[question.id] for question in questions]).astype(np.float64)
            scores = guide @ vectors.astype(np.float64).T
            own = scores[np.arange(len(questions)), np.arange(len(positives))]
            negative &= scores <= own[:, None]
        return negative
