"""From a step's questions to its batch: live retrieval, prompts, one shape for all devices."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ragjax.config import RunConfig
from ragjax.data.batches import (
    Batch,
    Example,
    Shape,
    choose_shapes,
    fit_shape,
    make_batch,
    pad_tokens,
    round_up,
    sequence_lengths,
)
from ragjax.data.questions import Question
from ragjax.pipeline import Pipeline
from ragjax.pretrained import embed

# Passages whose lengths stand for the corpus when the compiled shapes are chosen. A corpus of at most so many is
# measured whole, and rows are then no longer than its longest passage needs.
_LENGTH_SAMPLE = 20_000
_TRIED_PROMPTS = 2_000


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A step's batch [devices, micro-batches, ...] and what was put into it."""

    batch: Batch
    passage_rows: np.ndarray  # [questions, K]
    row_lengths: list[int]  # tokens of each generator row
    question_lengths: list[int]  # tokens of each question as the embedder reads it
    answer_tokens: int


class Assembler:
    """Builds batches for one phase. Holds no state that a step changes."""

    def __init__(self, config: RunConfig, pipeline: Pipeline, questions: Sequence[Question], devices: int):
        """
        Args:
          questions: all that will be assembled (training and dev), for the bounds on lengths.
          devices: how many share a step.
        """
        self._pipeline = pipeline
        self._config = config
        self._groups = (devices, config.gradient_accumulation)
        self.group_size = -(-config.batch_size // (devices * config.gradient_accumulation))
        longest = max(map(len, pipeline.embedder.tokenize([q.question for q in questions])))
        self._question_length = round_up(longest, 8)
        self._shapes = self._choose_shapes(questions)

    @property
    def _concatenated(self) -> bool:
        return self._config.objective == "concat_nll"

    def _choose_shapes(self, questions: Sequence[Question]) -> tuple[Shape, ...]:
        prompts, store = self._pipeline.prompts, self._pipeline.store
        texts = [question.question for question in questions]
        answers = [len(prompts.answer(question.answers[0])) for question in questions]
        stride = -(-len(store) // _LENGTH_SAMPLE)
        passages = [len(prompts.passage(store[row])) for row in range(0, len(store), stride)]
        longest_passage = max(passages) if stride == 1 else self._config.max_passage_tokens
        per_prompt = self._config.top_k if self._concatenated else 1
        # Passages and questions meet at random, under a seed that no flag moves: the shapes belong to the data.
        rng = np.random.default_rng(0)
        drawn = rng.choice(np.asarray(passages), (_TRIED_PROMPTS, per_prompt)).sum(axis=1)
        frames = [prompts.frame_length(text, per_prompt) for text in texts]
        lengths = np.minimum(drawn + rng.choice(np.asarray(frames), _TRIED_PROMPTS) + max(answers), prompts.window)
        longest = min(max(frames) + per_prompt * longest_passage + max(answers), prompts.window)
        prompts_per_batch = self.group_size * (1 if self._concatenated else self._config.top_k)
        return choose_shapes(lengths.tolist(), answers, prompts_per_batch, longest)

    def question_vectors(self, questions: Sequence[Question], variables: Mapping[str, Any]) -> np.ndarray:
        """[b, E] from the embedder's given variables."""
        embedder = self._pipeline.embedder
        tokens = embedder.tokenize([question.question for question in questions])
        padded, lengths = pad_tokens(tokens, self._config.batch_size, self._question_length)
        return np.asarray(embed(embedder.module, variables, padded, lengths))[: len(questions)]

    def assemble(self, questions: Sequence[Question], indices: Sequence[int], passage_rows: np.ndarray) -> Assembled:
        """Batch of at most `batch_size` questions with their passages [b, K] (row numbers, best first)."""
        pipeline = self._pipeline
        question_tokens = pipeline.embedder.tokenize([question.question for question in questions])
        vectors = pipeline.index.vectors_of(passage_rows)
        examples = [
            self._example(*parts)
            for parts in zip(indices, questions, question_tokens, vectors, passage_rows, strict=True)
        ]
        devices, accumulation = self._groups
        starts = range(0, devices * accumulation * self.group_size, self.group_size)
        groups = [examples[start : start + self.group_size] for start in starts]
        shape = fit_shape(self._shapes, groups)
        parts = [self._group(group, examples[0], shape) for group in groups]
        batch = jax.tree.map(lambda *leaves: np.stack(leaves).reshape(devices, accumulation, *leaves[0].shape), *parts)
        return Assembled(
            batch,
            passage_rows,
            sequence_lengths([example.prompts for example in examples], [example.answer for example in examples]),
            [len(example.question_tokens) for example in examples],
            sum(len(example.answer) for example in examples),
        )

    def _group(self, examples: Sequence[Example], any_example: Example, shape: Shape) -> Batch:
        if examples:
            return make_batch(examples, shape, self.group_size, self._question_length)
        # A device without questions gets empty masks in the same shapes.
        batch = make_batch([any_example], shape, self.group_size, self._question_length)
        return jax.tree.map(np.zeros_like, batch)

    def _example(
        self,
        index: int,
        question: Question,
        question_tokens: list[int],
        vectors: np.ndarray,
        rows: np.ndarray,
    ) -> Example:
        prompts, passages = self._pipeline.prompts, self._pipeline.passages(rows)
        answer = prompts.answer(question.answers[0])
        groups = [passages] if self._concatenated else [[passage] for passage in passages]
        built = [prompts.prompt(group, question.question, reserve=len(answer)) for group in groups]
        return Example(index, question_tokens, vectors, built, answer)
