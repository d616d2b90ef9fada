"""Figures on a moving embedder's retrieval by hand, and when they are called a collapse."""

from types import SimpleNamespace

import numpy as np
import pytest

from ragjax.data.passages import PassageList
from ragjax.data.questions import Passage, Question
from ragjax.retrieval import Retrieval
from ragjax.training.health import SAMPLE, WATCHED, RetrievalHealth

STORE = PassageList([Passage(f"p{i}", "", f"passage {i}") for i in range(20)])
# What the untrained embedder finds for four questions, best first.
START = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [0, 5, 10, 15, 16]]


class StubPipeline:
    """An embedder's parameters are the passages that it finds, a row for each question of the sample."""

    def __init__(self, params, store=STORE):
        self.embedder, self.store = SimpleNamespace(params=params), store
        self.asked: list[tuple[list[str], int]] = []

    def with_trained(self, trained):
        assert set(trained) == {"embedder"} and set(trained["embedder"]) == {"params"}
        other = StubPipeline(trained["embedder"]["params"], self.store)
        other.asked = self.asked
        return other

    def retrieve_each(self, questions, counts):
        self.asked.append((list(questions), max(counts)))
        rows = np.array([self.embedder.params[int(question)] for question in questions])
        return {k: Retrieval(rows[:, :k], np.zeros(rows[:, :k].shape, np.float32)) for k in counts}


def dev(*positives):
    """Questions whose text is their place; a place's positives, () for an unlabelled one."""
    return [Question(f"q{i}", str(i), ("yes",), tuple(f"p{row}" for row in rows)) for i, rows in enumerate(positives)]


LABELLED = dev((1,), (9, 19), (), (0, 16))


def figures_of(health, rows):
    return health.measure({"params": rows}).figures


def test_figures_by_hand():
    """Top 2 of four questions; recall looks at five, and at the labelled questions only."""
    health = RetrievalHealth(StubPipeline(START), LABELLED, top_k=2)
    # Different among 0 1 5 6 10 11 0 5: six, for four questions. Recall: 1, 1/2 and 2/2.
    start = figures_of(health, START)
    assert start == {
        "distinct_passages_per_100": pytest.approx(150.0),
        "top_k_agreement": 1.0,
        "recall_at_5": pytest.approx((1 + 0.5 + 1) / 3),
        "mrr_at_10": pytest.approx((1 / 2 + 1 / 5 + 1) / 3),
    }
    # Kept of the top 2: both (in the other order), one, none, one. Different: 0 1 5 7 12 13 3. Recall: 1, 1/2, 1/2.
    moved = [[1, 0, 2, 3, 4], [5, 7, 6, 8, 9], [12, 13, 10, 11, 14], [3, 5, 0, 10, 15]]
    assert figures_of(health, moved) == {
        "distinct_passages_per_100": pytest.approx(175.0),
        "top_k_agreement": pytest.approx((2 + 1 + 0 + 1) / 8),
        "recall_at_5": pytest.approx((1 + 0.5 + 0.5) / 3),
        "mrr_at_10": pytest.approx((1 + 1 / 5 + 1 / 3) / 3),
    }
    # The start is that of the phase, however often it is asked.
    assert figures_of(health, START) == start
    assert not health.has_collapsed(start)


def test_the_untrained_embedder_is_the_start():
    """Also where the first embedder to be measured has moved already, as after a resume."""
    pipeline = StubPipeline(START)
    health = RetrievalHealth(pipeline, LABELLED, top_k=2)
    assert figures_of(health, [[17, 18, 2, 3, 4]] * 4)["top_k_agreement"] == 0.0
    assert len(pipeline.asked) == 2
    figures_of(health, START)
    assert len(pipeline.asked) == 3  # the start is looked up once


def test_a_wide_top_k_does_not_widen_recall():
    health = RetrievalHealth(StubPipeline([[1, 2, 3, 4, 5, 6, 7]]), dev((6, 1)), top_k=7)
    figures = figures_of(health, [[1, 2, 3, 4, 5, 6, 7]])
    assert (figures["distinct_passages_per_100"], figures["recall_at_5"], figures["mrr_at_10"]) == (700.0, 0.5, 1.0)


def test_a_corpus_of_fewer_than_five_passages():
    store = PassageList([Passage(f"p{i}", "", "text") for i in range(3)])
    pipeline = StubPipeline([[2, 0, 1]], store)
    figures = figures_of(RetrievalHealth(pipeline, dev((1,)), top_k=1), [[2, 0, 1]])
    assert figures["recall_at_5"] == 1.0 and figures["mrr_at_10"] == pytest.approx(1 / 3)
    assert {k for _, k in pipeline.asked} == {3}


def test_variety_is_that_of_the_first_hundred_questions_and_recall_that_of_all():
    """Among the first hundred there are passages 0 and 1 only, and no question is answered; the last thirty all are."""
    rows = [[0, 1, 2, 3, 4]] * SAMPLE + [[10 + i % 10, 2, 3, 4, 5] for i in range(30)]
    pipeline = StubPipeline(rows)
    found = RetrievalHealth(pipeline, dev(*[(19,)] * SAMPLE, *[(2,)] * 30), top_k=2).measure({"params": rows})
    assert found.figures["distinct_passages_per_100"] == 2.0
    assert found.figures["recall_at_5"] == pytest.approx(30 / (SAMPLE + 30))
    assert found.recalls.tolist() == [0.0] * SAMPLE + [1.0] * 30
    assert [len(questions) for questions, _ in pipeline.asked] == [SAMPLE + 30] * 2


def test_no_more_than_so_many_questions_are_looked_up():
    rows = [[i % 20, (i + 1) % 20, 2, 3, 4] for i in range(WATCHED + 1)]
    pipeline = StubPipeline(rows)
    figures_of(RetrievalHealth(pipeline, dev(*[()] * (WATCHED + 1)), top_k=2), rows)
    assert {len(questions) for questions, _ in pipeline.asked} == {WATCHED}


def test_without_labels_there_is_no_recall():
    health = RetrievalHealth(StubPipeline(START), dev((), (), (), ()), top_k=2)
    assert set(figures_of(health, START)) == {"distinct_passages_per_100", "top_k_agreement"}


def test_without_dev_questions_there_are_no_figures():
    pipeline = StubPipeline(START)
    health = RetrievalHealth(pipeline, [], top_k=2)
    assert figures_of(health, START) == {}
    assert not health.has_collapsed({})
    assert pipeline.asked == []


@pytest.mark.parametrize("labels", [LABELLED, dev((), (), (), ())], ids=["labelled", "unlabelled"])
def test_the_same_passages_for_every_question_are_a_collapse(labels):
    health = RetrievalHealth(StubPipeline(START), labels, top_k=2)
    figures = figures_of(health, [[17, 18, 2, 3, 4]] * 4)
    assert figures["distinct_passages_per_100"] == 50.0
    assert health.has_collapsed(figures)


def test_other_passages_that_are_right_are_no_collapse():
    """Agreement falls to nothing while recall rises: that is what training is for."""
    health = RetrievalHealth(StubPipeline(START), dev((17,), (18,), (19,), (8,)), top_k=2)
    figures = figures_of(health, [[17, 2, 3, 4, 6], [18, 0, 1, 2, 3], [19, 15, 0, 1, 2], [8, 16, 1, 2, 3]])
    assert figures["top_k_agreement"] == 0.0 and figures["recall_at_5"] == 1.0
    assert not health.has_collapsed(figures)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([[1, 0, 2, 3, 4], [1, 0, 2, 3, 4], [1, 0, 2, 3, 4], [1, 0, 9, 19, 16]], "recall holds"),
        ([[17, 18, 2, 3, 4], [0, 1, 7, 8, 6], [2, 3, 4, 7, 8], [12, 13, 14, 17, 18]], "variety holds"),
        ([[0, 1, 2, 3, 4], [5, 0, 2, 3, 4], [10, 0, 2, 3, 4], [0, 5, 2, 3, 4]], "agreement holds"),
    ],
)
def test_each_figure_alone_is_no_collapse(rows, why):
    positives = {
        "recall holds": dev((1,), (0,), (), (16,)),
        "variety holds": dev((1,), (9,), (), (16,)),
        "agreement holds": dev((19,), (9,), (), (16,)),
    }[why]
    health = RetrievalHealth(StubPipeline(START), positives, top_k=2)
    start = figures_of(health, START)
    figures = figures_of(health, rows)
    few = figures["distinct_passages_per_100"] <= 0.7 * start["distinct_passages_per_100"]
    strange = figures["top_k_agreement"] <= 0.5
    worse = figures["recall_at_5"] <= 0.8 * start["recall_at_5"]
    assert {"recall holds": worse, "variety holds": few, "agreement holds": strange}[why] is False
    assert few + strange + worse == 2
    assert not health.has_collapsed(figures)
