"""Passages by row and by id; the hash of their texts."""

import hashlib
import tracemalloc

import numpy as np
import pytest

from ragjax.data import passages as module
from ragjax.data.passages import PassageList, hash_texts
from ragjax.data.questions import Passage

PASSAGES = [Passage("b", "Title", "one"), Passage("a", "", "two"), Passage("c", "T", "three")]


def test_rows_and_ids():
    store = PassageList(PASSAGES)
    assert len(store) == 3
    assert store[1] == store[np.int64(1)] == PASSAGES[1]
    assert list(store) == list(store) == PASSAGES
    rows = store.rows_of(["c", "b"])
    assert rows.dtype == np.int64 and rows.tolist() == [2, 0]
    assert store.rows_of([]).dtype == np.int64
    assert store.ids_of(np.array([2, 0, 0])) == ["c", "b", "b"]
    with pytest.raises(KeyError, match="nowhere"):
        store.rows_of(["nowhere"])


def test_an_id_that_occurs_twice():
    with pytest.raises(ValueError, match="same id"):
        PassageList([PASSAGES[0], PASSAGES[0]])


def test_the_corpus_is_not_held_twice():
    """A store was once larger than its passages: it kept what the embedder reads of each of them."""
    passages = [Passage(f"p{i}", f"Title {i}", f"{i} " + "x" * 10_000) for i in range(500)]
    tracemalloc.start()
    try:
        store = PassageList(passages)
        assert len(store.content_hash) == 64
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(mine is theirs for mine, theirs in zip(store, passages, strict=True))
    assert kept < 500 * 1_000


def test_content_hash_is_of_what_the_embedder_reads():
    content = PassageList(PASSAGES).content_hash
    assert content == hash_texts(["Title. one", "two", "T. three"])
    renamed = [Passage("x", "", "Title. one"), Passage("y", "", "two"), Passage("z", "", "T. three")]
    assert PassageList(renamed).content_hash == content
    assert PassageList(PASSAGES[::-1]).content_hash != content


def test_the_corpus_is_hashed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "hash_texts", lambda texts: calls.append(list(texts)) or "hash")
    store = PassageList(PASSAGES)
    assert calls == []  # and only where somebody asks
    assert store.content_hash == store.content_hash == "hash"
    assert calls == [["Title. one", "two", "T. three"]]


def test_hash_texts():
    def length(text):
        return len(text.encode()).to_bytes(8, "little")

    expected = hashlib.sha256(length("é") + "é".encode() + length("b") + b"b").hexdigest()
    assert hash_texts(["é", "b"]) == expected
    assert len({hash_texts(texts) for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], [])}) == 5
