"""What is retrieved follows from questions' and passages' vectors, whatever an index thinks of the passages."""

import dataclasses

import numpy as np
import pytest

from ragjax.costs import Cost
from ragjax.errors import DivergedError, UserError
from ragjax.retrieval import ArrayVectors, ExactIndex, Proposal, Queries, Retriever
from tests.retrieval.cases import brute_force, queries_of, retrieve, unit


@dataclasses.dataclass
class Proposing:
    """An index that proposes given rows to every question."""

    rows: list[int]
    asked: list[tuple[Queries, int]] = dataclasses.field(default_factory=list)

    def search(self, queries, k):
        self.asked.append((queries, k))
        return Proposal(np.tile(np.array(self.rows, np.int64), (len(queries.texts), 1)), Cost(2.0, 100.0))

    def describe(self):
        return {"type": "proposing"}


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("k", [1, 5, 300])
def test_over_an_exact_index_it_equals_brute_force(queries, k):
    rng = np.random.default_rng(queries * k)
    vectors, asked = unit(rng, 300, 24), unit(rng, queries, 24)
    found = retrieve(ExactIndex(vectors), vectors, asked, k)
    rows, scores = brute_force(vectors, asked, k)
    assert (found.passage_rows.dtype, found.scores.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(found.passage_rows, rows)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-6)


def test_inner_products_are_no_cosines():
    vectors = np.array([[1, 0], [10, 0], [-20, 0], [0, 5]], np.float32)
    found = retrieve(ExactIndex(vectors), vectors, np.array([[2, 0.5]], np.float32), 4)
    assert found.passage_rows.tolist() == [[1, 3, 0, 2]]
    assert found.scores.tolist() == [[20.0, 2.5, 2.0, -40.0]]


def test_the_order_of_what_is_proposed_means_nothing():
    """And each question has an order of its own."""
    rng = np.random.default_rng(3)
    vectors, asked = unit(rng, 50, 8), unit(rng, 6, 8)
    proposed = [40, 3, 17, 8, 29]
    of_these, scores = brute_force(vectors[sorted(proposed)], asked, 5)
    expected = np.array(sorted(proposed))[of_these]
    assert len({tuple(rows) for rows in expected.tolist()}) > 1
    for rows in (proposed, proposed[::-1], sorted(proposed)):
        found = retrieve(Proposing(rows), vectors, asked, 5)
        np.testing.assert_array_equal(found.passage_rows, expected)
        np.testing.assert_allclose(found.scores, scores, rtol=1e-6)


def test_of_more_than_k_proposed_the_best_are_kept():
    vectors = np.array([[1], [5], [3], [4], [2]], np.float32)
    found = retrieve(Proposing([0, 2, 3, 4]), vectors, np.ones((2, 1), np.float32), 2)
    assert found.passage_rows.tolist() == [[3, 2]] * 2
    assert found.scores.tolist() == [[4.0, 3.0]] * 2


def test_of_equal_scores_the_lower_row_comes_first():
    vectors = np.ones((9, 4), np.float32)
    found = retrieve(Proposing([8, 2, 5, 0]), vectors, np.ones((1, 4), np.float32), 3)
    assert found.passage_rows.tolist() == [[0, 2, 5]]


def test_scores_do_not_depend_on_the_other_questions():
    rng = np.random.default_rng(5)
    vectors, asked = unit(rng, 400, 48), unit(rng, 64, 48)
    retriever = Retriever(ExactIndex(vectors), ArrayVectors(vectors))
    together = retriever.retrieve(queries_of(asked), 7)
    for place in range(0, 64, 9):
        alone = retriever.retrieve(queries_of(asked[place : place + 1]), 7)
        np.testing.assert_array_equal(alone.passage_rows[0], together.passage_rows[place])
        np.testing.assert_array_equal(alone.scores[0], together.scores[place])


def test_an_index_gets_texts_and_vectors():
    index = Proposing([0, 1])
    vectors = np.eye(2, dtype=np.float32)
    asked = np.array([[1, 0], [0, 1], [1, 1]], np.float64)  # float32 from here on
    Retriever(index, ArrayVectors(vectors)).retrieve(Queries(["a", "b", "c"], asked), 2)
    ((queries, k),) = index.asked
    assert (list(queries.texts), k) == (["a", "b", "c"], 2)
    assert queries.vectors.dtype == np.float32 and queries.vectors.flags.c_contiguous
    np.testing.assert_array_equal(queries.vectors, asked)


def test_the_cost_is_the_indexs_and_the_time_that_scoring_takes():
    vectors = np.eye(3, dtype=np.float32)
    cost = retrieve(Proposing([0, 1]), vectors, vectors, 2).cost
    assert (cost.flops, cost.tokens, cost.backward_tokens) == (100.0, 0, 0)
    assert 2.0 < cost.seconds < 10.0


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([0, 1], ValueError, "proposed 2 passages where 3"),
        ([1, 2, 1, 0], ValueError, "a passage twice"),
        ([0, 1, -1], IndexError, "start at 0"),  # how FAISS says that it has found no more
        ([0, 1, 4], IndexError, "4"),
    ],
)
def test_an_index_that_breaks_its_word(rows, error, message):
    """Vectors of equal scores, so that nothing but the row tells passages apart."""
    with pytest.raises(error, match=message):
        retrieve(Proposing(rows), np.ones((4, 2), np.float32), np.ones((2, 2), np.float32), 3)


@pytest.mark.parametrize("k", [0, -1, 4, 100])
def test_top_k_outside_the_corpus(k):
    vectors = np.eye(3, dtype=np.float32)
    with pytest.raises(UserError, match=rf"--top_k={k} does not fit a corpus of 3 passages: choose 1 to 3"):
        retrieve(ExactIndex(vectors), vectors, vectors, k)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_questions_that_are_not_finite(value):
    vectors = np.eye(3, dtype=np.float32)
    with pytest.raises(DivergedError, match="not finite"):
        retrieve(ExactIndex(vectors), vectors, np.full((1, 3), value, np.float32), 2)


def test_shapes():
    vectors = np.eye(3, dtype=np.float32)
    found = retrieve(ExactIndex(vectors), vectors, np.zeros((0, 3), np.float32), 2)
    assert found.passage_rows.shape == found.scores.shape == (0, 2)
    retriever = Retriever(ExactIndex(vectors), ArrayVectors(vectors))
    for texts, wrong in ((["a", "b", "c"], vectors[0]), (["a"], np.zeros((1, 4), np.float32)), (["a"], vectors)):
        with pytest.raises(ValueError, match="question vectors must be"):
            retriever.retrieve(Queries(texts, wrong), 1)
