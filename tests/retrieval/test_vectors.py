"""Stored vectors by row."""

import numpy as np
import pytest

from ragjax.retrieval import ArrayVectors
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
