"""The passages of a corpus by number: passage rows, which an index proposes, are rows of this store."""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Int64

from ragjax.data.questions import Passage


@runtime_checkable
class PassageStore(Protocol):
    """The P passages of one corpus in a fixed order, by row number 0..P-1 and by id."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: SupportsIndex) -> Passage:
        """Raises IndexError for a row outside 0..P-1."""

    def __iter__(self) -> Iterator[Passage]:
        """All of them, in order of their rows."""

    def __contains__(self, identity: object) -> bool:
        """Whether a passage has this id."""

    def rows_of(self, ids: Iterable[str]) -> Int64[np.ndarray, " n"]:
        """Row numbers of passages named by their ids. Raises KeyError for an unknown id."""

    def ids_of(self, passage_rows: Iterable[SupportsIndex]) -> list[str]:
        """Ids of passages named by their row numbers, for instance the [K] that a question reads."""

    @property
    def content_hash(self) -> str:
        """sha256 of what the embedder reads, in order: equal where the vectors of one embedder are equal."""

    @property
    def records_hash(self) -> str:
        """sha256 of all that the passages are, ids included, in order."""


class PassageList:
    """A store in memory."""

    def __init__(self, passages: Sequence[Passage]):
        """Keeps `passages` [P] as they are, without a copy: they must not change afterwards.

        Raises ValueError if an id occurs twice.
        """
        self._passages = passages
        self._row_of = {passage.id: row for row, passage in enumerate(passages)}
        if len(self._row_of) < len(passages):
            raise ValueError("two passages have the same id")

    def __len__(self) -> int:
        return len(self._passages)

    def __getitem__(self, row: SupportsIndex) -> Passage:
        place = int(row)
        if place < 0:  # would count from the end
            raise IndexError("passage rows start at 0")
        return self._passages[place]

    def __iter__(self) -> Iterator[Passage]:
        return iter(self._passages)

    def __contains__(self, identity: object) -> bool:
        return identity in self._row_of

    def rows_of(self, ids: Iterable[str]) -> Int64[np.ndarray, " n"]:
        return np.array([self._row_of[identity] for identity in ids], np.int64)

    def ids_of(self, passage_rows: Iterable[SupportsIndex]) -> list[str]:
        return [self[row].id for row in passage_rows]

    @functools.cached_property
    def content_hash(self) -> str:
        return hash_texts(passage.embedder_text for passage in self._passages)

    @functools.cached_property
    def records_hash(self) -> str:
        digest = RecordsHash()
        for passage in self._passages:
            digest.add(passage.id, passage.title, passage.text)
        return digest.hexdigest()


class TextsHash:
    """sha256 of a sequence of texts; each is preceded by its length, so that no two sequences run together."""

    def __init__(self):
        self._digest = hashlib.sha256()

    def add(self, text: str) -> None:
        data = text.encode()
        self._digest.update(len(data).to_bytes(8, "little"))
        self._digest.update(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class RecordsHash:
    """sha256 of a sequence of parsed records, so that packing, spacing and unknown keys do not count."""

    def __init__(self):
        self._digest = hashlib.sha256()

    def add(self, *values: object) -> None:
        self._digest.update(json.dumps(values).encode() + b"\n")

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def hash_texts(texts: Iterable[str]) -> str:
    """`TextsHash` of all of them."""
    digest = TextsHash()
    for text in texts:
        digest.add(text)
    return digest.hexdigest()
