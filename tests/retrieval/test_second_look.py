"""Second hops and second looks, on passages whose vectors and texts are made for it."""

import dataclasses

import numpy as np
import pytest

from ragjax.costs import Cost
from ragjax.data.passages import PassageList
from ragjax.data.questions import Passage
from ragjax.retrieval import ArrayVectors, ExactIndex, Queries, RerankedIndex, Retriever, TwoHopIndex
from ragjax.retrieval.two_hops import joined
from tests.retrieval.cases import brute_force, queries_of, unit

# Passages 0 to 9 point into directions of their own.
EYE = np.eye(10, dtype=np.float32)
STORE = PassageList([Passage(f"p{i}", f"title {i}", f"text {i}") for i in range(10)])
EXACT = Retriever(ExactIndex(EYE), ArrayVectors(EYE))


def asking(*directions: float) -> np.ndarray:
    """A question's vector, with so much of each direction."""
    return np.array([[*directions, *[0.0] * (10 - len(directions))]], np.float32)


@dataclasses.dataclass
class Encoder:
    """Gives one vector to whatever is read, and keeps it."""

    vector: np.ndarray
    read: list[str] = dataclasses.field(default_factory=list)

    def __call__(self, texts):
        self.read += texts
        return np.repeat(self.vector, len(texts), axis=0), Cost(9.0, 70.0, 7)


def test_the_second_search_asks_with_the_first_passage():
    encoder = Encoder(asking(0, 0, 0, 0, 3, 2, 1))
    question = Queries(["who?"], asking(0, 0.5, 1, 0.7))  # nearest: 2, 3, 1
    found = TwoHopIndex(EXACT, STORE, encoder).search(question, 5)
    assert encoder.read == ["who? title 2. text 2"]
    assert found.passage_rows.tolist() == [[2, 3, 1, 4, 5]]  # three of the first, two of the second
    assert found.cost.flops == 2 * (2 * 10 * 10) + 70
    assert found.cost.tokens == 7
    assert found.cost.seconds < 9.0  # measured here, not told


@pytest.mark.parametrize(
    ("k", "rows"), [(1, [2]), (2, [2, 3]), (3, [2, 3, 4]), (4, [2, 3, 4, 5]), (6, [2, 3, 1, 4, 5, 6])]
)
def test_what_both_find_counts_once(k, rows):
    """The second search finds 3, 2, 4, 5, 6, ..."""
    encoder = Encoder(asking(0, 0, 5, 6, 4, 3, 2))
    found = TwoHopIndex(EXACT, STORE, encoder).search(Queries(["who?"], asking(0, 0.5, 1, 0.7)), k)
    assert found.passage_rows.tolist() == [rows]


def test_joined_rows_are_enough_whatever_is_shared():
    rng = np.random.default_rng(0)
    for k in range(1, 8):
        for _ in range(50):
            first, second = (rng.permutation(10)[:k] for _ in range(2))
            rows = joined(first[: (k + 1) // 2], second, k)
            assert len(set(rows.tolist())) == len(rows) == k
            assert set(rows.tolist()) <= set(first.tolist()) | set(second.tolist())


@dataclasses.dataclass
class ByNumber:
    """Likes a passage by the number in its text, in an order of its own."""

    asked: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def score(self, questions, passages):
        self.asked += zip(questions, [passage.id for passage in passages], strict=True)
        return np.array([(7 * int(passage.id[1:])) % 50 for passage in passages], np.float32), Cost(0.0, 5.0, 3)

    def describe(self):
        return {"type": "by number"}


@pytest.mark.parametrize("k", [1, 4, 12, 20])
def test_the_best_k_of_the_nearest_n_are_proposed(k):
    """With ties, as the scores of p0 and p50; more than N passages are looked at where more are asked for."""
    rng = np.random.default_rng(1)
    vectors, asked = unit(rng, 60, 8), unit(rng, 5, 8)
    store = PassageList([Passage(f"p{i}", "", "text") for i in range(60)])
    index = RerankedIndex(Retriever(ExactIndex(vectors), ArrayVectors(vectors)), store, ByNumber(), top=12)
    nearest = brute_force(vectors, asked, max(12, k))[0]
    expected = [sorted(rows, key=lambda row: -((7 * row) % 50))[:k] for rows in nearest.tolist()]  # stable
    found = index.search(queries_of(asked), k)
    assert found.passage_rows.tolist() == expected
    assert found.cost.flops == 2 * 5 * 60 * 8 + 5
    assert found.cost.tokens == 3


def test_a_pair_is_scored_once():
    reranker = ByNumber()
    index = RerankedIndex(EXACT, STORE, reranker, top=3)
    queries = Queries(["a", "b", "a"], np.concatenate([asking(3, 2, 1), asking(3, 2, 1), asking(3, 2, 0, 1)]))
    first = index.search(queries, 2)
    assert sorted(reranker.asked) == [(q, p) for q, ps in (("a", "0123"), ("b", "012")) for p in [f"p{n}" for n in ps]]
    again = index.search(queries, 2)
    assert len(reranker.asked) == 7
    np.testing.assert_array_equal(again.passage_rows, first.passage_rows)
    assert again.cost.tokens == 0


def test_more_than_there_is_cannot_be_looked_at():
    index = RerankedIndex(EXACT, STORE, ByNumber(), top=100)
    assert index.search(Queries(["a"], asking(1)), 2).passage_rows.tolist() == [[7, 6]]  # 49 and 42


def test_no_questions():
    none = Queries([], np.zeros((0, 10), np.float32))
    for index in (RerankedIndex(EXACT, STORE, ByNumber(), 5), TwoHopIndex(EXACT, STORE, Encoder(asking(1)))):
        assert index.search(none, 2).passage_rows.shape == (0, 2)


def test_describe():
    reranked = RerankedIndex(EXACT, STORE, ByNumber(), 5).describe()
    assert (reranked["type"], reranked["top"], reranked["reranker"]) == ("reranked", 5, {"type": "by number"})
    assert reranked["candidates"] == TwoHopIndex(EXACT, STORE, Encoder(asking(1))).describe()["single"]


def test_each_number_of_passages_is_a_search_where_ranks_are_not_the_vectors():
    """The best of 12 by number, and the best 3 of the 12 nearest, are not the first of one another."""
    rng = np.random.default_rng(1)
    vectors, asked = unit(rng, 60, 8), unit(rng, 5, 8)
    store = PassageList([Passage(f"p{i}", "", "text") for i in range(60)])
    near = Retriever(ExactIndex(vectors), ArrayVectors(vectors))
    chosen = Retriever(RerankedIndex(near, store, ByNumber(), top=30), ArrayVectors(vectors), nested=False)
    found = chosen.retrieve_each(queries_of(asked), [3, 10, 3])
    for k in (3, 10):
        np.testing.assert_array_equal(found[k].passage_rows, chosen.retrieve(queries_of(asked), k).passage_rows)
    assert (found[3].passage_rows != found[10].passage_rows[:, :3]).any()
    by_vectors = near.retrieve_each(queries_of(asked), [3, 10])
    np.testing.assert_array_equal(by_vectors[3].passage_rows, brute_force(vectors, asked, 3)[0])
    np.testing.assert_array_equal(by_vectors[10].passage_rows, brute_force(vectors, asked, 10)[0])
    assert (by_vectors[3].cost.flops, by_vectors[10].cost.flops) == (0, 2 * 5 * 60 * 8)
