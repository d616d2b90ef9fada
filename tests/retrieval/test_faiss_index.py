"""Search by FAISS, exact and approximate, against brute force in numpy."""

import faiss
import numpy as np
import pytest

from ragjax.errors import UserError
from ragjax.retrieval import ArrayVectors
from ragjax.retrieval.faiss_index import (
    ApproximateIndex,
    ExactIndex,
    expected_bytes,
    make_index,
    read_index,
    train_index,
    write_index,
)
from tests.retrieval.cases import brute_force, queries_of, retrieve, unit


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
    assert described == {"type": "Flat", "passages": 7, "width": 3, "bytes": 84}


# ---- approximate search ------------------------------------------------------------------------------------

P, E, FACTORIES = 600, 16, ("IVF12,Flat", "IVF12,PQ4x4", "HNSW8", "PCA8,IVF12,SQ8", "SQ8")


@pytest.fixture(scope="module")
def corpus():
    return unit(np.random.default_rng(5), P, E)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Beside other processes FAISS's threads mostly wait for each other."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


_BUILT = {}


def built(factory, vectors):
    """An index of its own for each set of vectors, built once: nothing here changes it."""
    key = (factory, vectors.tobytes())
    if key not in _BUILT:
        index = _BUILT[key] = make_index(factory, vectors.shape[1])
        train_index(index, factory, vectors)
        index.add(vectors)
    return _BUILT[key]


def approximate(factory, vectors, nprobe=0):
    return ApproximateIndex(built(factory, vectors), factory, ArrayVectors(vectors), nprobe)


@pytest.mark.parametrize("factory", FACTORIES)
def test_an_index_reads_back_from_its_file_and_proposes_the_same(tmp_path, corpus, factory):
    asked = unit(np.random.default_rng(6), 9, E)
    index = built(factory, corpus)
    write_index(index, tmp_path / "index.faiss")
    assert [path.name for path in tmp_path.iterdir()] == ["index.faiss"]
    mapped = ApproximateIndex(read_index(tmp_path / "index.faiss"), factory, ArrayVectors(corpus), 0)
    rows = search(mapped, asked, 5)
    assert rows.shape == (9, 32)
    np.testing.assert_array_equal(rows, search(ApproximateIndex(index, factory, ArrayVectors(corpus), 0), asked, 5))


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("k", [1, 40, P])
def test_every_question_gets_enough_passages_none_twice(corpus, factory, k):
    """40 are more than most lists hold, and all are asked for at last."""
    rows = search(
        approximate(factory, corpus, nprobe=1 if "IVF" in factory else 0), unit(np.random.default_rng(7), 5, E), k
    )
    assert rows.shape[1] >= k and rows.min() >= 0 and rows.max() < P
    assert all(len(set(row)) == rows.shape[1] for row in rows.tolist())


def test_all_lists_are_exact_search(corpus):
    asked = unit(np.random.default_rng(8), 7, E)
    found = retrieve(approximate("IVF12,Flat", corpus, nprobe=12), corpus, asked, 10)
    rows, scores = brute_force(corpus, asked, 10)
    np.testing.assert_array_equal(found.passage_rows, rows)
    np.testing.assert_array_equal(found.scores, scores)


def test_inner_products_and_not_distances():
    """The nearest by distance is the short one; by inner product it is the long one."""
    vectors = np.concatenate([unit(np.random.default_rng(0), 50, 4), np.float32([[9, 0, 0, 0]])])
    for factory in ("IVF2,Flat", "HNSW8", "SQ8"):
        found = retrieve(
            approximate(factory, vectors, 2 if "IVF" in factory else 0), vectors, np.eye(1, 4, dtype=np.float32), 1
        )
        assert found.passage_rows.tolist() == [[50]], factory


def test_a_question_whose_lists_hold_too_few_is_searched_wider(corpus):
    asked = unit(np.random.default_rng(6), 3, E)
    index = approximate("IVF12,Flat", corpus, nprobe=1)
    assert (index._found(asked, 100, 1)[0] == -1).any(axis=1).all()  # FAISS by itself: a list has about fifty
    found = index.search(queries_of(asked), 25)
    assert found.passage_rows.min() >= 0
    assert found.cost.flops < 2 * 2 * E * 3 * P  # without a look at everything


class Broken:
    """A FAISS index without lists that finds two passages, whatever it is asked."""

    def __init__(self, index):
        self.index = index

    def search(self, vectors, k):
        scores, rows = self.index.search(vectors, k)
        rows[:, 2:] = -1
        return scores, rows


def test_what_finds_too_little_at_its_widest_is_searched_exactly(corpus):
    index = approximate("SQ8", corpus)
    index._index = Broken(index._index)
    asked = unit(np.random.default_rng(9), 3, E)
    np.testing.assert_array_equal(retrieve(index, corpus, asked, 5).passage_rows, brute_force(corpus, asked, 5)[0])


def test_work_grows_with_the_lists_looked_at(corpus):
    asked = queries_of(unit(np.random.default_rng(9), 4, E))
    few, all_lists = (approximate("IVF12,Flat", corpus, n).search(asked, 1).cost.flops for n in (6, 12))
    assert all_lists == 2 * E * 4 * (P + 12)  # every vector and every list's centre
    assert 2 * E * 4 * (P / 4) < few < all_lists


@pytest.mark.parametrize("factory", ["nonsense", "LSH", "IVF4,PQ5", "IDMap,Flat"])
def test_what_faiss_cannot_make_is_one_sentence(factory):
    with pytest.raises(UserError, match=f"^--index={factory} "):
        make_index(factory, E)


def test_too_few_vectors_and_needless_nprobe(corpus):
    with pytest.raises(UserError, match=r"^--index=IVF64,Flat cannot be trained on 10 vectors .*--train_sample"):
        train_index(make_index("IVF64,Flat", E), "IVF64,Flat", corpus[:10])
    with pytest.raises(UserError, match=r"^--nprobe=3 goes with an index that has lists"):
        approximate("HNSW8", corpus, nprobe=3)
    assert approximate("IVF12,Flat", corpus, nprobe=99).nprobe == 12


def test_a_file_that_is_no_index(tmp_path):
    (tmp_path / "index.faiss").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="no index that FAISS reads"):
        read_index(tmp_path / "index.faiss")


@pytest.mark.parametrize("factory", ["IVF12,Flat", "IVF12,PQ4x4", "HNSW8", "SQ8", "PCA8,IVF12,SQ8"])
def test_the_expected_size_is_near_the_real_one(tmp_path, factory):
    vectors = unit(np.random.default_rng(4), 3000, 32)
    write_index(built(factory, vectors), tmp_path / "index.faiss")
    assert expected_bytes(factory, 32, 3000) == pytest.approx((tmp_path / "index.faiss").stat().st_size, rel=0.12)


@pytest.mark.parametrize("rows", [7, 64, 300])
def test_exact_search_over_shards_is_that_over_the_array(rows):
    """Blocks smaller than k, ties across blocks."""
    rng = np.random.default_rng(2)
    vectors = np.repeat(unit(rng, 75, 8), 4, axis=0)[rng.permutation(300)]
    blocks = Blocks(vectors, rows)
    for queries in (1, 30):
        asked = unit(rng, queries, 8)
        np.testing.assert_array_equal(search(ExactIndex(blocks), asked, 20), brute_force(vectors, asked, 20)[0])


class Blocks(ArrayVectors):
    """Vectors that come in pieces."""

    def __init__(self, vectors, rows):
        super().__init__(vectors)
        self._rows = rows

    def blocks(self):
        return (self._vectors[start : start + self._rows] for start in range(0, len(self), self._rows))
