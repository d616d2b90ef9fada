"""Fused rankings, by hand and by a sum over all ranks."""

import numpy as np
import pytest

from ragjax.data.passages import PassageList
from ragjax.data.questions import Passage
from ragjax.retrieval import ArrayVectors, Bm25Index, ExactIndex, HybridIndex, Queries, Retriever, hybrid
from tests.retrieval.cases import brute_force, unit

WORDS = ["river", "town", "bridge", "city", "north", "old", "stone", "war", "king", "queen"]


def test_fusion_by_hand():
    """2 has 1/61 + 1/62, 7 and 5 (ranks 2 and 3 of one) less, and 9 as much as 7: the first ranking decides."""
    first, second = np.array([2, 7, 5]), np.array([9, 2, 5])
    assert hybrid.fused([first, second]).tolist() == [2, 5, 9, 7]
    assert 1 / 63 + 1 / 63 > 1 / 61 > 1 / 62
    assert hybrid.fused([np.array([4, 6]), np.array([6, 4])]).tolist() == [4, 6]
    assert hybrid.fused([np.array([3]), np.array([], np.int64)]).tolist() == [3]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """300 passages of random words with random vectors, and questions."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(300)]
    vectors = unit(rng, 300, 16)
    store = PassageList([Passage(str(i), "", text) for i, text in enumerate(texts)])
    words = Bm25Index(store, tmp_path_factory.mktemp("words"), show_progress=False)
    return vectors, words, Queries(["old stone bridge", "war", "nothing known"], unit(rng, 3, 16))


@pytest.mark.parametrize("k", [1, 5, 40, 150])
def test_it_proposes_exactly_the_k_of_the_fused_ranking(world, k):
    vectors, words, queries = world
    index = HybridIndex(Retriever(ExactIndex(vectors), ArrayVectors(vectors)), words)
    found = index.search(queries, k)
    depth = max(k, 100)
    dense = brute_force(vectors, queries.vectors, depth)[0]
    for place, text in enumerate(queries.texts):
        scores = words.scores(text).astype(float)
        lexical = [row for row in np.argsort(-scores, kind="stable") if scores[row] > 0][:depth]
        total = np.zeros(300)
        total[dense[place]] += 1 / (60 + np.arange(1, depth + 1))
        total[lexical] += 1 / (60 + np.arange(1, len(lexical) + 1))
        # Of equal sums the nearer one: ranks of one list alone meet those of the other.
        nearness = np.full(300, 1000)
        nearness[dense[place]] = np.arange(depth)
        expected = np.lexsort((nearness, -total))[:k]
        assert found.passage_rows[place].tolist() == expected.tolist()
    assert found.cost.flops == 2 * 3 * 300 * 16
    assert set(found.passage_rows[0].tolist()) != set(dense[0][:k].tolist()) or k == 150


def test_a_question_without_known_words_finds_the_nearest(world):
    vectors, words, queries = world
    index = HybridIndex(Retriever(ExactIndex(vectors), ArrayVectors(vectors)), words)
    assert index.search(queries, 5).passage_rows[2].tolist() == brute_force(vectors, queries.vectors, 5)[0][2].tolist()


def test_describe(world):
    vectors, words, _ = world
    index = HybridIndex(Retriever(ExactIndex(vectors), ArrayVectors(vectors)), words)
    described = index.describe()
    assert (described["type"], described["constant"], described["depth"]) == ("hybrid", 60, 100)
    assert (described["dense"]["type"], described["words"]["type"]) == ("Flat", "BM25")
