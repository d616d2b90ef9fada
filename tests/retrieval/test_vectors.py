"""Stored vectors by row."""

import numpy as np
import pytest

from ragjax.retrieval import ArrayVectors, ExactIndex, MovingVectors, Queries, Retriever, at_first
from tests.retrieval.cases import unit


def test_vectors_of():
    vectors = unit(np.random.default_rng(1), 20, 4)
    store = ArrayVectors(vectors)
    assert (len(store), store.width) == (20, 4)
    rows = np.array([[3, 0, 3], [19, 7, 1]])
    found = store.vectors_of(rows)
    assert found.shape == (2, 3, 4) and found.dtype == np.float32
    np.testing.assert_array_equal(found, vectors[rows])
    found[:] = 0  # a copy
    np.testing.assert_array_equal(store.vectors_of([3, 0]), vectors[[3, 0]])
    assert store.vectors_of([]).shape == (0, 4)
    for wrong in ([20], [-1]):
        with pytest.raises(IndexError):
            store.vectors_of(wrong)


def test_a_memory_map_is_read_where_it_is_asked(tmp_path):
    vectors = unit(np.random.default_rng(1), 20, 4)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r+")
    store = ArrayVectors(mapped)
    mapped[3] = 7  # seen, so nothing was copied
    found = store.vectors_of([3, 4])
    np.testing.assert_array_equal(found, [[7] * 4, vectors[4]])
    found[:] = 0  # a copy
    np.testing.assert_array_equal(store.vectors_of([4]), vectors[[4]])


@pytest.mark.parametrize("wrong", [np.zeros(3, np.float32), np.zeros((0, 3), np.float32), np.eye(3)])
def test_shapes(wrong):
    with pytest.raises(ValueError, match="vectors must be float32"):
        ArrayVectors(wrong)


def test_vectors_that_move_are_searched_as_they_are_now():
    """By hand: the question (1, 0) finds the first row, then the second, whose vector has become the longer one."""
    first = ArrayVectors(np.array([[1, 0], [0, 1], [-1, 0]], np.float32))
    store = MovingVectors(first)
    retriever = Retriever(ExactIndex(store), store)
    question = Queries(["why?"], np.array([[1, 0]], np.float32))
    found = retriever.retrieve(question, 2)
    assert found.passage_rows.tolist() == [[0, 1]] and found.scores.tolist() == [[1, 0]]
    assert store.longest == 1
    store.replace(np.array([[1, 0], [3, 4], [2, 0]], np.float32))
    found = retriever.retrieve(question, 2)
    assert found.passage_rows.tolist() == [[1, 2]] and found.scores.tolist() == [[3, 2]]
    assert store.longest == 5
    np.testing.assert_array_equal(at_first(store).vectors_of([0, 1, 2]), [[1, 0], [0, 1], [-1, 0]])
    assert at_first(first) is first
    with pytest.raises(ValueError, match=r"vectors must be \[3, 2\], not \[2, 2\]"):
        store.replace(np.eye(2, dtype=np.float32))
