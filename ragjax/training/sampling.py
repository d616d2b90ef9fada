"""Which questions each step trains on: every epoch is a seeded permutation, and nothing else decides the order."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ragjax.arrays import Ids
from ragjax.config import RunConfig
from ragjax.data.questions import Question


class QuestionBatch(NamedTuple):
    """The questions of a step, or of a measurement on the dev split."""

    questions: Sequence[Question]
    tokens: Sequence[Ids]  # the embedder's, specials included
    indices: Sequence[int]  # their places in their split
    step: int  # optimizer steps done
    training: bool  # or measured only: decides how the step's own work is counted


def question_order(count: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Places of the questions of step `step` (from 0); the last batch of an epoch may be short."""
    epoch, place = divmod(step, math.ceil(count / batch_size))
    permutation = np.random.default_rng((seed, epoch)).permutation(count)
    return permutation[place * batch_size : (place + 1) * batch_size]


def total_steps(config: RunConfig, questions: int, batch_size: int) -> int:
    """Optimizer steps of a phase that trains on this number of questions."""
    return config.max_steps or config.epochs * math.ceil(questions / batch_size)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The training questions in their seeded order, and the dev questions in file order."""

    train: Sequence[Question]
    dev: Sequence[Question]
    batch_size: int
    seed: int
    tokenize: Callable[[Sequence[str]], list[list[int]]]  # the embedder's

    def __post_init__(self):
        if not self.train:
            raise ValueError("there is no question to train on")

    @property
    def longest_question(self) -> int:
        """In the embedder's tokens."""
        return max(map(len, self.tokenize([question.question for question in (*self.train, *self.dev)])))

    def training_batch(self, step: int) -> QuestionBatch:
        """The questions of step `step` (from 0)."""
        order = question_order(len(self.train), self.batch_size, step, self.seed)
        return self._batch(self.train, order.tolist(), step, training=True)

    def dev_batches(self, step: int) -> list[QuestionBatch]:
        """All dev questions, batch by batch, after `step` steps."""
        size, count = self.batch_size, len(self.dev)
        places = [range(start, min(start + size, count)) for start in range(0, count, size)]
        return [self._batch(self.dev, indices, step, training=False) for indices in places]

    def asked(self, steps: int) -> np.ndarray:
        """Places of the training questions that the first `steps` steps ask for, ascending."""
        count = len(self.train)
        return np.sort(question_order(count, min(steps * self.batch_size, count), 0, self.seed))

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that step `step` (from 0) belongs to."""
        return step // math.ceil(len(self.train) / self.batch_size)

    def questions_seen(self, steps: int) -> int:
        """Questions trained on in the first `steps` steps, repetitions counted."""
        count = len(self.train)
        epochs, rest = divmod(steps, math.ceil(count / self.batch_size))
        return epochs * count + min(rest * self.batch_size, count)

    def _batch(self, split: Sequence[Question], indices: Sequence[int], step: int, training: bool) -> QuestionBatch:
        questions = [split[i] for i in indices]
        tokens = self.tokenize([question.question for question in questions])
        return QuestionBatch(questions, tokens, indices, step, training)
