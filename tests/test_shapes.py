"""Shapes in annotations: every call in the tests is held to them, and batches have those of their fields."""

from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError, jaxtyped

from ragjax import losses
from ragjax.data.batches import Batch, RankingBatch, Rows, Shape, make_batch
from tests.tiny_modules import random_examples

DOCS = jnp.zeros((2, 3))
ANSWERS = jnp.zeros((2, 3, 4))
MASK = jnp.ones((2, 4), bool)


@pytest.mark.parametrize(
    "inputs",
    [
        (DOCS, ANSWERS, jnp.ones((2, 5), bool)),  # T
        (DOCS, jnp.zeros((2, 1, 4)), MASK),  # K, which would have been broadcast
        (jnp.zeros((1, 3)), ANSWERS, MASK),  # B, likewise
        (DOCS[0], ANSWERS, MASK),
        (DOCS, ANSWERS, MASK.astype(jnp.int32)),
    ],
)
def test_a_wrong_shape_or_type_is_refused(inputs):
    with pytest.raises(TypeCheckError):
        losses.rag_token_nll(*inputs)
    with pytest.raises(TypeCheckError):
        jax.jit(losses.rag_token_nll)(*inputs)


def test_the_right_ones_are_not_wherever_they_are_traced():
    expected = losses.rag_token_nll(DOCS, ANSWERS, MASK)
    found = jax.jit(losses.rag_token_nll)(np.asarray(DOCS), np.asarray(ANSWERS), np.asarray(MASK))
    np.testing.assert_array_equal(found, expected)
    stacked = [jnp.stack([values] * 2) for values in (DOCS, ANSWERS, MASK)]
    np.testing.assert_array_equal(jax.vmap(losses.rag_token_nll)(*stacked), jnp.stack([expected] * 2))
    assert jax.eval_shape(losses.rag_token_nll, DOCS, ANSWERS, MASK).shape == (2,)


def holds(batch: NamedTuple) -> bool:
    """Whether every field, those of parts included, has its annotated shape, one letter standing for one size."""

    def fits(part: NamedTuple) -> bool:
        kinds = {name: get_args(annotation) for name, annotation in type(part).__annotations__.items()}
        return all(
            fits(value) if isinstance(value, Rows) else any(isinstance(value, kind) for kind in kinds[name])
            for name, value in part._asdict().items()
        )

    with jaxtyped("context"):
        return fits(batch)


def test_a_batch_has_the_shapes_of_its_fields():
    batch = make_batch(random_examples(3), Shape(6, 64, 8), size=4, question_length=8)
    assert holds(batch)
    assert not holds(batch._replace(question_lengths=batch.question_lengths[:3]))
    assert not holds(batch._replace(rows=batch.rows._replace(answer_mask=batch.rows.answer_mask[:, :7])))


def test_a_stacked_batch_has_more_axes_and_may_be_made():
    batch = make_batch(random_examples(2), Shape(6, 64, 8), size=2, question_length=8)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf] * 2), batch)
    assert isinstance(stacked, Batch) and not holds(stacked)
    assert holds(jax.tree.map(lambda leaf: leaf[0], stacked))


def test_each_row_of_labels_belongs_to_a_question():
    batch = RankingBatch(
        np.zeros((2, 8), np.int32),
        np.ones(2, np.int32),
        np.zeros((5, 4), np.float32),
        np.zeros(2, np.int32),
        np.ones((2, 5), bool),
    )
    assert holds(batch)
    assert not holds(batch._replace(candidate_mask=np.ones((2, 4), bool)))
