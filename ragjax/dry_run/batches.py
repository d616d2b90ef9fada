"""A phase's largest batch, as shapes: what its first step gets (`ragjax.training.signals`)."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ragjax.config import RunConfig
from ragjax.data.batches import Batch, DrawnBatch, RankingBatch, Rows, ScoredBatch, Shape
from ragjax.parallel import Layout
from ragjax.training.answer_scorer import ROWS_PER_CALL, RowLimits
from ragjax.training.objectives import (
    DrawnObjective,
    LeaveOneOutObjective,
    LikelihoodObjective,
    Objective,
    RankingObjective,
)
from ragjax.training.signals import Models, prompt_passages
from ragjax.training.signals.prompt_side import PromptLengths, largest_first, ways_of


class _Maker:
    """Makes the shapes of arrays [groups, micro-batches, ...]."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def __call__(self, *shape: int, dtype: Any = np.int32) -> Any:  # shapes stand where a batch says arrays
        return jax.ShapeDtypeStruct((self.layout.groups, self.layout.micro_batches, *shape), dtype)


def largest_batch(
    objective: Objective, models: Models, layout: Layout, question_length: int, lengths: PromptLengths | None
) -> tuple[Any, Layout, Shape | None]:
    """(the batch, how its questions are shared out, the shape of the generator's rows if it has any).

    question_length: W, in the embedder's tokens.
    lengths: of the prompts; None where no prompts are read.
    """
    config, width = models.config, models.embedder.width
    if isinstance(objective, RankingObjective):
        return _ranking(_Maker(layout), config, question_length, width), layout, None
    assert lengths is not None
    if isinstance(objective, LikelihoodObjective | LeaveOneOutObjective):  # answers are numbers
        answer = lengths.limits().longest_answer
        return _scored(_Maker(layout), config, question_length, width, answer), layout, None
    prompts = config.top_k // prompt_passages(config)
    packed = config.backward_passages or prompts
    layout, (shape,) = largest_first(ways_of(layout, lengths, packed))[0]
    make = _Maker(layout)
    rows = _rows(make, shape, packed)
    if isinstance(objective, DrawnObjective):
        scored = _scored(make, config, question_length, width, shape.answer_length)
        drawn, weights = make(layout.size, packed), make(layout.size, packed, dtype=np.float32)
        return DrawnBatch(scored, rows, drawn, weights), layout, shape
    vectors = make(layout.size, config.top_k, width, dtype=np.float32)
    return Batch(*_questions(make, question_length), vectors, rows), layout, shape


def scored_rows(groups: int, limits: RowLimits) -> Rows:
    """The largest of what an `AnswerScorer` reads at once, [groups, ...]."""
    rows = ROWS_PER_CALL[0]
    make = _Maker(Layout(groups, 1, rows * limits.prompts_per_row))
    made = _rows(make, Shape(rows, limits.row_length, limits.usual_answer), 1)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((groups, *leaf.shape[2:]), leaf.dtype), made)


def _questions(make: _Maker, length: int) -> Sequence[Any]:
    return make(make.layout.size, length), make(make.layout.size)


def _rows(make: _Maker, shape: Shape, prompts: int) -> Rows:
    size, rows = make.layout.size, make(shape.rows, shape.row_length)
    answers = make(size, shape.answer_length)
    index = make(size, prompts, shape.answer_length, 2)
    return Rows(rows, rows, rows, index, answers, make(size, shape.answer_length, dtype=np.bool_), rows)


def _scored(make: _Maker, config: RunConfig, question_length: int, width: int, answer_length: int) -> ScoredBatch:
    size, top_k = make.layout.size, config.top_k
    vectors, scores = (make(size, top_k, last, dtype=np.float32) for last in (width, answer_length))
    mask = make(size, answer_length, dtype=np.bool_)
    return ScoredBatch(*_questions(make, question_length), vectors, scores, mask)


def _ranking(make: _Maker, config: RunConfig, question_length: int, width: int) -> RankingBatch:
    candidates = config.ranking_batch_size * (1 + config.hard_negatives)
    vectors = make(candidates, width, dtype=np.float32)
    mask = make(make.layout.size, candidates, dtype=np.bool_)
    return RankingBatch(*_questions(make, question_length), vectors, make(make.layout.size), mask)
