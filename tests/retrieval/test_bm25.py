"""Search by words against the formula in float64, and what is kept of it on disk."""

import collections
import json
import math
import sys

import numpy as np
import pytest

from ragjax.data.passages import PassageList
from ragjax.data.questions import Passage
from ragjax.errors import UserError
from ragjax.retrieval import Bm25Index, Queries, bm25

TEXTS = [
    "the river runs past the old town",
    "the old town has an old bridge, and the bridge is old",
    "a city",
    "",
    "Zürich is a city on a river",
    "北京是中国的首都",
    "the river runs past the old town",
]


def store_of(texts):
    return PassageList([Passage(f"p{i}", "", text) for i, text in enumerate(texts)])


def split(text):
    """Of these texts: words by hand."""
    if "北" in text:
        return ["北京", "京是", "是中", "中国", "国的", "的首", "首都"]
    return text.lower().replace(",", "").replace("ü", "u").split()


def by_formula(texts, question, k1=1.2, b=0.75):
    """Okapi with Lucene's idf, one passage after another."""
    passages = [collections.Counter(split(text)) for text in texts]
    mean = sum(passage.total() for passage in passages) / len(passages)
    scores = []
    for passage in passages:
        score = 0.0
        for word in split(question):
            having = sum(word in other for other in passages)
            idf = math.log(1 + (len(passages) - having + 0.5) / (having + 0.5))
            norm = k1 * (1 - b + b * passage.total() / mean)
            score += idf * passage[word] / (passage[word] + norm)
        scores.append(score)
    return np.array(scores)


QUESTIONS = ["old bridge", "the river city", "old old town", "zurich", "unknown words", "", "北京是"]


@pytest.fixture
def index(tmp_path):
    return Bm25Index(store_of(TEXTS), tmp_path, show_progress=False)


@pytest.mark.parametrize("question", QUESTIONS[:-1])
def test_scores_are_the_formulas(index, question):
    np.testing.assert_allclose(index.scores(question), by_formula(TEXTS, question), rtol=1e-6, atol=1e-7)


def test_a_script_without_spaces_is_found_by_pairs_of_characters(index):
    assert np.flatnonzero(index.scores("北京是")).tolist() == [5]
    assert index.scores("北是").max() == 0.0


@pytest.mark.parametrize("n", [1, 3, 7])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_ranking_holds_what_shares_a_word_best_first(index, question, n):
    """Passages 0 and 6 are equal: the lower row comes first."""
    scores = by_formula(TEXTS, question) if question != "北京是" else np.eye(7)[5]
    order = [row for row in np.argsort(-scores.astype(np.float32), kind="stable").tolist() if scores[row] > 0]
    assert index.rankings([question], n)[0].tolist() == order[:n]


def test_what_is_missing_is_filled_up_with_the_first_passages(index):
    found = index.search(Queries(["zurich", "old bridge", ""], np.zeros((3, 2), np.float32)), 3)
    assert found.passage_rows.tolist() == [[4, 0, 1], [1, 0, 6], [0, 1, 2]]
    assert found.passage_rows.dtype == np.int64


def test_it_is_built_once(tmp_path, monkeypatch, index):
    monkeypatch.setattr(Bm25Index, "_built", lambda *_: pytest.fail("built again"))
    again = Bm25Index(store_of(TEXTS), tmp_path)
    np.testing.assert_array_equal(again.scores("old bridge"), index.scores("old bridge"))
    assert isinstance(again._scores.scores["data"], np.memmap)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert {path.suffix for path in folder.iterdir()} == {".npy", ".json"}
    for path in folder.glob("*.npy"):
        np.load(path, allow_pickle=False)


def test_other_texts_or_settings_are_other_indexes(tmp_path, monkeypatch, index):
    other = Bm25Index(store_of(TEXTS[::-1]), tmp_path, show_progress=False)
    assert other.rankings(["zurich"], 1)[0].tolist() == [2]
    monkeypatch.setattr(bm25, "K1", 0.5)
    flatter = Bm25Index(store_of(TEXTS), tmp_path, show_progress=False)
    np.testing.assert_allclose(flatter.scores("old"), by_formula(TEXTS, "old", k1=0.5), rtol=1e-6)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3


@pytest.mark.parametrize("damage", ["cut", "lost", "meta"])
def test_a_damaged_index_is_built_again(tmp_path, index, damage):
    expected = np.array(index.scores("old bridge"))
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    data = folder / "data.csc.index.npy"
    if damage == "cut":
        data.write_bytes(data.read_bytes()[:-4])
    elif damage == "lost":
        data.unlink()
    else:
        (folder / "meta.json").write_text(json.dumps({"layout": 1}))
    with pytest.warns(UserWarning, match="damaged: building it again"):
        again = Bm25Index(store_of(TEXTS), tmp_path, show_progress=False)
    np.testing.assert_array_equal(again.scores("old bridge"), expected)


def test_what_a_killed_process_left_is_no_index(tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bm25, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            Bm25Index(store_of(TEXTS), tmp_path, show_progress=False)
    assert [path.suffix for path in tmp_path.iterdir() if path.is_dir()] == [".partial"]
    index = Bm25Index(store_of(TEXTS), tmp_path, show_progress=False)
    np.testing.assert_allclose(index.scores("old"), by_formula(TEXTS, "old"), rtol=1e-6)
    assert not list(tmp_path.glob("*.partial"))


def test_texts_without_any_word(tmp_path):
    index = Bm25Index(store_of(["", "?!"]), tmp_path, show_progress=False)
    assert index.search(Queries(["a"], np.zeros((1, 2), np.float32)), 2).passage_rows.tolist() == [[0, 1]]


def test_without_bm25s_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=r"search by words needs bm25s: pip install 'ragjax\[bm25\]'"):
        Bm25Index(store_of(TEXTS), tmp_path, show_progress=False)


def test_describe(index):
    described = index.describe()
    assert described.pop("bm25s").count(".") >= 1
    assert described == {"type": "BM25", "k1": 1.2, "b": 0.75, "words": 1, "passages": 7}
