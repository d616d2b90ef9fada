"""The passages of a corpus by number: passage rows, which an index proposes, are rows of this store."""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Int64

from ragjax.data.questions import Passage


@runtime_checkable
class PassageStore(Protocol):
    """The P passages of one corpus in a fixed order, by row number 0..P-1 and by id."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: SupportsIndex) -> Passage: ...

    def __iter__(self) -> Iterator[Passage]:
        """All of them, in order of their rows."""

    def rows_of(self, ids: Iterable[str]) -> Int64[np.ndarray, " n"]:
        """Row numbers of passages named by their ids. Raises KeyError for an unknown id."""

    def ids_of(self, passage_rows: Iterable[SupportsIndex]) -> list[str]:
        """Ids of passages named by their row numbers, for instance the [K] that a question reads."""

    @property
    def content_hash(self) -> str:
        """sha256 of what the embedder reads, in order: equal where the vectors of one embedder are equal."""


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
        return self._passages[int(row)]

    def __iter__(self) -> Iterator[Passage]:
        return iter(self._passages)

    def rows_of(self, ids: Iterable[str]) -> Int64[np.ndarray, " n"]:
        return np.array([self._row_of[identity] for identity in ids], np.int64)

    def ids_of(self, passage_rows: Iterable[SupportsIndex]) -> list[str]:
        return [self[row].id for row in passage_rows]

    @functools.cached_property
    def content_hash(self) -> str:
        return hash_texts(passage.embedder_text for passage in self._passages)


def hash_texts(texts: Iterable[str]) -> str:
    """sha256 of a sequence of texts; each is preceded by its length, so that no two sequences run
    together.
    """
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
