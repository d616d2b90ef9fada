"""Search by words: BM25 (Robertson and Zaragoza 2009) as Lucene has it. The only file that imports bm25s.

    cache_dir/<key>/           bm25s's own files: the scores of every word in every passage, memory-mapped
    cache_dir/<key>/meta.json  what the key was made of, and the files' seals
    cache_dir/<key>.lock       held by the one process that builds

The score of a passage for a question is the sum, over the question's words (a repeated one counts as often), of

    ln(1 + (P - d + 0.5) / (d + 0.5)) * f / (f + k1 * (1 - b + b * length / mean length))

with f the word's count in the passage, d the passages that have it, and lengths in words. The finished folder appears
by one rename, so a killed process leaves nothing that could be taken for an index.
"""

import hashlib
import json
import logging
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from ragjax.costs import Cost
from ragjax.data.passages import PassageStore
from ragjax.errors import UserError
from ragjax.files import Seal, caching, lock_file, read_json, sync, write_json
from ragjax.retrieval.retriever import Proposal, Queries
from ragjax.retrieval.words import RULES, words_of
from ragjax.voice import progress

# Lucene's.
K1, B = 1.2, 0.75
_LAYOUT = 1  # part of the key: raise it when files of another kind are written


class Bm25Index:
    """Finds passages that share words with a question."""

    def __init__(self, store: PassageStore, cache_dir: Path, show_progress: bool = True):
        """Opens the index over the passages' `embedder_text`, or builds and stores it.

        Building holds the numbers of all words of the corpus in memory; searching does not. Several processes may ask
        at once: one builds, the others wait. A damaged index is built again, with a warning.

        Raises UserError where bm25s is not installed, or the cache cannot be written.
        """
        _bm25s()  # before anything is read
        rules = {"layout": _LAYOUT, "words": RULES, "k1": K1, "b": B}
        self._identity: dict[str, Any] = {**rules, "texts": store.content_hash, "count": len(store)}
        name = hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()[:32]
        folder = cache_dir / name
        self._scores = _opened(folder, self._identity)
        if self._scores is None:
            with (
                caching("the words of the passages", folder),
                lock_file(
                    folder.with_name(f"{name}.lock"), "another process is indexing the words of these passages: waiting"
                ),
            ):
                self._scores = _opened(folder, self._identity) or self._built(store, folder, show_progress)

    def _built(self, store: PassageStore, folder: Path, show_progress: bool) -> Any:
        if folder.exists():
            warnings.warn(f"the stored index of words in {folder} is damaged: building it again", stacklevel=3)
            shutil.rmtree(folder)
        vocabulary: dict[str, int] = {}
        numbers = []
        for passage in progress(store, desc="indexing words", total=len(store), unit=" passages", shown=show_progress):
            numbers.append([vocabulary.setdefault(word, len(vocabulary)) for word in words_of(passage.embedder_text)])
        no_word = vocabulary.setdefault("", len(vocabulary))  # which no text has; bm25s wants some word
        if not any(numbers):  # and a mean length above 0
            numbers = [[no_word]] * len(store)
        index = _bm25s().BM25(k1=K1, b=B, method="lucene")
        index.index((numbers, vocabulary), show_progress=False)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        index.save(partial, show_progress=False)
        seals = [_sealed(path).as_json() for path in sorted(partial.iterdir())]
        write_json(partial / "meta.json", {**self._identity, "files": seals}, everywhere=True)
        partial.rename(folder)
        return _opened(folder, self._identity)

    def search(self, queries: Queries, k: int) -> Proposal:
        """The k passages with the highest scores. Where fewer share a word with the question, the first ones of the
        corpus fill up.
        """
        began = time.perf_counter()
        rows = np.empty((len(queries.texts), k), np.int64)
        for place, ranking in enumerate(self.rankings(queries.texts, k)):
            missing = k - len(ranking)
            others = np.setdiff1d(np.arange(k), ranking)[:missing]
            rows[place] = np.concatenate([ranking, others])
        return Proposal(rows, Cost(time.perf_counter() - began))

    def rankings(self, texts: Sequence[str], n: int) -> list[Int64[np.ndarray, " _"]]:
        """Of each text at most n passages that share a word with it, best first; of equal scores the lower row."""
        return [_highest(self.scores(text), n) for text in texts]

    def scores(self, text: str) -> Float32[np.ndarray, " P"]:
        """The score of every passage; 0 where it shares no word with the text."""
        known = self._scores.get_tokens_ids(words_of(text))
        return self._scores.get_scores_from_ids(known)

    def describe(self) -> dict[str, Any]:
        """What a run records of its index: type, bm25s version, formula, passages P."""
        settings = {name: self._identity[name] for name in ("k1", "b", "words")}
        return {"type": "BM25", "bm25s": _bm25s().__version__, **settings, "passages": self._identity["count"]}


def _highest(scores: Float32[np.ndarray, " P"], n: int) -> Int64[np.ndarray, " found"]:
    """At most n rows with a score above 0."""
    rows = np.flatnonzero(scores)
    if len(rows) > n:
        last = np.partition(scores[rows], len(rows) - n)[len(rows) - n]
        rows = rows[scores[rows] >= last]  # all that are as good as the n-th
    return rows[np.argsort(-scores[rows], kind="stable")][:n].astype(np.int64)


def _opened(folder: Path, identity: dict[str, Any]) -> Any:
    """The stored index; None if there is none or it is not what was written."""
    try:
        meta = read_json(folder / "meta.json")
        if any(meta[name] != value for name, value in identity.items()):
            return None
        if not all(Seal.read(seal).renewed(folder) for seal in meta["files"]):
            return None
        return _bm25s().BM25.load(folder, mmap=True, show_progress=False)
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None


def _sealed(path: Path) -> Seal:
    sync(path)
    return Seal.of(path)


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise UserError("search by words needs bm25s: pip install 'ragjax[bm25]'") from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it reports every step
    return bm25s
