"""The index against brute force in numpy."""

import numpy as np
import pytest

from ragjax.errors import UserError
from ragjax.retrieval.faiss_index import ExactIndex


def unit(rng, *shape):
    vectors = rng.normal(size=shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def brute_force(vectors, queries, k):
    """Ids and scores by a full sort of the float64 products, equal float32 scores by id."""
    scores = np.array([[np.float32(np.dot(v, q)) for v in vectors.astype(float)] for q in queries.astype(float)])
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(scores, ids, axis=1)


# FAISS takes other paths for 20 queries and more.
@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("k", [1, 5, 300])
def test_equals_brute_force(queries, k):
    rng = np.random.default_rng(queries * k)
    vectors, asked = unit(rng, 300, 24), unit(rng, queries, 24)
    ids, scores = ExactIndex(vectors).search(asked, k)
    expected_ids, expected_scores = brute_force(vectors, asked, k)
    assert (ids.dtype, scores.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-6)


def test_inner_product_not_cosine_or_distance():
    vectors = np.array([[1, 0], [10, 0], [-20, 0], [0, 5]], np.float32)
    ids, scores = ExactIndex(vectors).search(np.array([[2, 0.5]], np.float32), 4)
    assert ids.tolist() == [[1, 3, 0, 2]]
    assert scores.tolist() == [[20.0, 2.5, 2.0, -40.0]]


@pytest.mark.parametrize("queries", [1, 33])
def test_of_equal_scores_the_lower_id_comes_first(queries):
    """Every distinct vector stands 30 times, at scattered rows: ties lie inside the k best and across k."""
    rng = np.random.default_rng(0)
    distinct, asked = unit(rng, 10, 37), unit(rng, queries, 37)
    copy_of = rng.permutation(np.repeat(np.arange(10), 30))
    index = ExactIndex(distinct[copy_of])
    order = np.argsort(-(asked.astype(float) @ distinct.T.astype(float)), axis=1)
    expected = np.array([np.concatenate([np.flatnonzero(copy_of == best) for best in row]) for row in order])
    for k in (1, 5, 30, 47, 300):
        ids, scores = index.search(asked, k)
        np.testing.assert_array_equal(ids, expected[:, :k])
        assert (np.diff(scores, axis=1) <= 0).all()


def test_all_passages_equal():
    ids, _ = ExactIndex(np.ones((500, 8), np.float32)).search(np.ones((25, 8), np.float32), 5)
    np.testing.assert_array_equal(ids, np.tile(np.arange(5), (25, 1)))


def test_scores_do_not_depend_on_the_other_queries():
    rng = np.random.default_rng(5)
    index, asked = ExactIndex(unit(rng, 400, 48)), unit(rng, 64, 48)
    ids, scores = index.search(asked, 7)
    for row in range(0, 64, 9):
        one_ids, one_scores = index.search(asked[row : row + 1], 7)
        np.testing.assert_array_equal(one_ids[0], ids[row])
        np.testing.assert_array_equal(one_scores[0], scores[row])


def test_vectors_of():
    vectors = unit(np.random.default_rng(1), 20, 4)
    index = ExactIndex(vectors)
    ids = np.array([[3, 0, 3], [19, 7, 1]])
    found = index.vectors_of(ids)
    assert found.shape == (2, 3, 4) and found.dtype == np.float32
    np.testing.assert_array_equal(found, vectors[ids])
    found[:] = 0  # a copy
    np.testing.assert_array_equal(index.vectors_of([3, 0]), vectors[[3, 0]])
    for wrong in ([20], [-1]):
        with pytest.raises(IndexError):
            index.vectors_of(wrong)


def test_vectors_are_copied():
    vectors = unit(np.random.default_rng(1), 20, 4)
    kept = vectors.copy()
    index = ExactIndex(vectors)
    vectors[:] = 0
    np.testing.assert_array_equal(index.search(kept[4:5], 1)[0], [[4]])
    np.testing.assert_array_equal(index.vectors_of(np.arange(20)), kept)


def test_a_read_only_memory_map_and_float64_queries(tmp_path):
    vectors = unit(np.random.default_rng(1), 20, 4)
    np.save(tmp_path / "vectors.npy", vectors)
    index = ExactIndex(np.load(tmp_path / "vectors.npy", mmap_mode="r"))
    assert index.search(vectors[7:8].astype(np.float64), 1)[0].tolist() == [[7]]


@pytest.mark.parametrize("k", [0, -1, 4, 100])
def test_top_k_outside_the_corpus(k):
    with pytest.raises(UserError, match=rf"--top_k={k} does not fit a corpus of 3 passages: choose 1 to 3"):
        ExactIndex(np.eye(3, dtype=np.float32)).search(np.eye(3, dtype=np.float32), k)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_queries_that_are_not_finite(value):
    with pytest.raises(UserError, match="not finite"):
        ExactIndex(np.eye(3, dtype=np.float32)).search(np.full((1, 3), value, np.float32), 2)


def test_shapes():
    index = ExactIndex(np.eye(3, dtype=np.float32))
    ids, scores = index.search(np.zeros((0, 3), np.float32), 2)
    assert ids.shape == scores.shape == (0, 2)
    for wrong in (np.zeros(3, np.float32), np.zeros((1, 4), np.float32)):
        with pytest.raises(ValueError, match="queries must be"):
            index.search(wrong, 1)
    for wrong in (np.zeros(3, np.float32), np.zeros((0, 3), np.float32), np.eye(3)):
        with pytest.raises(ValueError, match="vectors must be float32"):
            ExactIndex(wrong)


def test_describe():
    described = ExactIndex(np.zeros((7, 3), np.float32)).describe()
    assert described.pop("faiss").count(".") >= 1
    assert described == {"type": "IndexFlatIP", "passages": 7, "width": 3, "bytes": 84}
