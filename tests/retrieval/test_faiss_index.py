"""The exact index against brute force in numpy."""

import numpy as np
import pytest

from ragjax.retrieval.faiss_index import ExactIndex
from tests.retrieval.cases import brute_force, queries_of, unit


def search(index, asked, k):
    return index.search(queries_of(asked), k).passage_rows


# FAISS takes other paths for 20 queries and more.
@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("k", [1, 5, 300])
def test_equals_brute_force(queries, k):
    rng = np.random.default_rng(queries * k)
    vectors, asked = unit(rng, 300, 24), unit(rng, queries, 24)
    rows = search(ExactIndex(vectors), asked, k)
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(rows, brute_force(vectors, asked, k)[0])


def test_inner_product_not_cosine_or_distance():
    vectors = np.array([[1, 0], [10, 0], [-20, 0], [0, 5]], np.float32)
    assert search(ExactIndex(vectors), np.array([[2, 0.5]], np.float32), 4).tolist() == [[1, 3, 0, 2]]


@pytest.mark.parametrize("queries", [1, 33])
def test_of_equal_scores_the_lower_row_comes_first(queries):
    """Every distinct vector stands 30 times, at scattered rows: ties lie inside the k best and across k."""
    rng = np.random.default_rng(0)
    distinct, asked = unit(rng, 10, 37), unit(rng, queries, 37)
    copy_of = rng.permutation(np.repeat(np.arange(10), 30))
    index = ExactIndex(distinct[copy_of])
    order = np.argsort(-(asked.astype(float) @ distinct.T.astype(float)), axis=1)
    expected = np.array([np.concatenate([np.flatnonzero(copy_of == best) for best in row]) for row in order])
    for k in (1, 5, 30, 47, 300):
        np.testing.assert_array_equal(search(index, asked, k), expected[:, :k])


def test_all_passages_equal():
    rows = search(ExactIndex(np.ones((500, 8), np.float32)), np.ones((25, 8), np.float32), 5)
    np.testing.assert_array_equal(rows, np.tile(np.arange(5), (25, 1)))


def test_rows_do_not_depend_on_the_other_queries():
    """Every passage stands three times, so that rounding alone could tell them apart."""
    rng = np.random.default_rng(5)
    index, asked = ExactIndex(np.repeat(unit(rng, 150, 48), 3, axis=0)), unit(rng, 64, 48)
    rows = search(index, asked, 7)
    for place in range(0, 64, 9):
        np.testing.assert_array_equal(search(index, asked[place : place + 1], 7)[0], rows[place])


def test_vectors_are_copied():
    vectors = unit(np.random.default_rng(1), 20, 4)
    kept = vectors.copy()
    index = ExactIndex(vectors)
    vectors[:] = 0
    np.testing.assert_array_equal(search(index, kept[4:5], 1), [[4]])


def test_a_read_only_memory_map(tmp_path):
    vectors = unit(np.random.default_rng(1), 20, 4)
    np.save(tmp_path / "vectors.npy", vectors)
    index = ExactIndex(np.load(tmp_path / "vectors.npy", mmap_mode="r"))
    assert search(index, vectors[7:8], 1).tolist() == [[7]]


def test_the_work_of_a_search():
    """A product of every query with every passage, a multiplication and an addition at each place of the vectors."""
    rng = np.random.default_rng(0)
    cost = ExactIndex(unit(rng, 300, 24)).search(queries_of(unit(rng, 7, 24)), 5).cost
    assert (cost.flops, cost.tokens, cost.backward_tokens) == (2 * 7 * 300 * 24, 0, 0)
    assert 0 < cost.seconds < 60


def test_shapes():
    assert search(ExactIndex(np.eye(3, dtype=np.float32)), np.zeros((0, 3), np.float32), 2).shape == (0, 2)
    for wrong in (np.zeros(3, np.float32), np.zeros((0, 3), np.float32), np.eye(3)):
        with pytest.raises(ValueError, match="vectors must be float32"):
            ExactIndex(wrong)


def test_describe():
    described = ExactIndex(np.zeros((7, 3), np.float32)).describe()
    assert described.pop("faiss").count(".") >= 1
    assert described == {"type": "IndexFlatIP", "passages": 7, "width": 3, "bytes": 84}
