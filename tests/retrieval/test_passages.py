"""Passages by row and by id; the hash of their texts."""

import hashlib

import numpy as np
import pytest

from ragjax.data.questions import Passage
from ragjax.retrieval.passages import PassageStore, hash_texts

PASSAGES = [Passage("b", "Title", "one"), Passage("a", "", "two"), Passage("c", "T", "three")]


def test_rows_ids_and_texts():
    store = PassageStore(PASSAGES)
    assert len(store) == 3
    assert store[1] == store[np.int64(1)] == PASSAGES[1]
    assert store.ids == ["b", "a", "c"]
    assert store.embedder_texts == ["Title. one", "two", "T. three"]
    rows = store.rows_of(["c", "b"])
    assert rows.dtype == np.int64 and rows.tolist() == [2, 0]
    assert store.rows_of([]).dtype == np.int64
    assert store.ids_of(np.array([2, 0, 0])) == ["c", "b", "b"]
    with pytest.raises(KeyError, match="nowhere"):
        store.rows_of(["nowhere"])


def test_an_id_that_occurs_twice():
    with pytest.raises(ValueError, match="same id"):
        PassageStore([PASSAGES[0], PASSAGES[0]])


def test_content_hash_is_of_what_the_embedder_reads():
    content = PassageStore(PASSAGES).content_hash
    assert content == hash_texts(["Title. one", "two", "T. three"])
    renamed = [Passage("x", "", "Title. one"), Passage("y", "", "two"), Passage("z", "", "T. three")]
    assert PassageStore(renamed).content_hash == content
    assert PassageStore(PASSAGES[::-1]).content_hash != content


def test_hash_texts():
    def length(text):
        return len(text.encode()).to_bytes(8, "little")

    expected = hashlib.sha256(length("é") + "é".encode() + length("b") + b"b").hexdigest()
    assert hash_texts(["é", "b"]) == expected
    assert len({hash_texts(texts) for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], [])}) == 5
