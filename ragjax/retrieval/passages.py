"""The passages of a corpus by row number: what the index answers with is a row of this store."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from ragjax.data.questions import Passage


class PassageStore:
    """The passages of one corpus in their fixed order; row numbers 0..P-1 (int64) are the ids that the index
    knows.

    passages: list of P Passage.  ids: list of their P string ids.  embedder_texts: the P texts that are
    encoded.
    """

    def __init__(self, passages: Sequence[Passage]):
        """Raises ValueError if an id occurs twice."""
        self.passages = list(passages)
        self.ids = [passage.id for passage in self.passages]
        self.embedder_texts = [passage.embedder_text for passage in self.passages]
        self._row_of = {identity: row for row, identity in enumerate(self.ids)}
        if len(self._row_of) < len(self.ids):
            raise ValueError("two passages have the same id")

    def __len__(self) -> int:
        return len(self.passages)

    def __getitem__(self, row: int) -> Passage:
        return self.passages[row]

    @property
    def content_hash(self) -> str:
        """sha256 of the embedder texts in order: equal where the vectors of one embedder are equal."""
        return hash_texts(self.embedder_texts)

    def rows_of(self, ids: Iterable[str]) -> np.ndarray:
        """Row numbers [n] int64 of passages named by their ids. Raises KeyError for an unknown id."""
        return np.array([self._row_of[identity] for identity in ids], np.int64)

    def ids_of(self, rows: Iterable[int]) -> list[str]:
        """String ids of passages named by their row numbers, for instance one question's [K] from the
        index.
        """
        return [self.ids[row] for row in rows]


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
