"""Passages to vectors, once per (corpus, embedder), kept on disk in shards (`ragjax.retrieval.shards`).

Choices. A shard is the unit of work: its texts are tokenised once, encoded by like length, written to a file of another
name, put on disk, renamed and only then recorded. So a killed process loses one shard at most, the next one begins
with the first that is missing, and the bytes do not depend on where it was killed. Memory holds one shard's texts,
tokens and vectors. A file that no longer is what was recorded is encoded again; the others stay.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from ragjax.data.passages import PassageStore
from ragjax.errors import UserError
from ragjax.files import CACHE_MEND, Seal, check_room, lock_file, storing
from ragjax.retrieval.shards import (
    ROWS,
    Identity,
    Shard,
    VectorShards,
    as_float32,
    as_stored,
    file_name,
    read_record,
    unbroken,
    write_record,
)
from ragjax.retrieval.vectors import longest_of
from ragjax.voice import progress, warn


@runtime_checkable
class PassageEncoder(Protocol):
    """What makes vectors of passages: an `Embedder`."""

    @property
    def passage_record(self) -> Mapping[str, Any]:
        """All that shapes its vectors of passages: its weights' hash, the longest input, the prefix."""

    @property
    def width(self) -> int:
        """E."""

    def passage_tokens(self, passages: Sequence[str], /) -> list[list[int]]:
        """Token ids of passages' texts."""

    def encode_tokens(
        self, tokens: Sequence[Sequence[int]], /, *, advance: Callable[[int], object] | None = None
    ) -> Float32[np.ndarray, "n E"]:
        """Their vectors. advance: is told of every few that are done."""


@dataclass(frozen=True)
class Place:
    """A folder for vectors."""

    folder: Path
    mend: str = CACHE_MEND  # what to do where there is no room


def cached_vectors(
    encoder: PassageEncoder, store: PassageStore, cache_dir: Path, show_progress: bool = True
) -> VectorShards:
    """`encode_corpus` into a folder of the cache that belongs to this corpus and embedder."""
    identity = identity_of(encoder, store)
    return encode_corpus(encoder, store, Place(Path(cache_dir) / identity.key), identity, show_progress)


def identity_of(encoder: PassageEncoder, store: PassageStore, dtype: str = "float32") -> Identity:
    """What an embedder's vectors of a corpus are made of; dtype: of the stored numbers."""
    return Identity(store.content_hash, dict(encoder.passage_record), len(store), encoder.width, dtype, ROWS)


def encode_corpus(
    encoder: PassageEncoder, store: PassageStore, place: Place, identity: Identity, show_progress: bool = True
) -> VectorShards:
    """Vectors [P, E] of the P passages, from the place's folder or encoded now, beginning with the first missing shard.

    Several processes may ask for the same vectors at once: one encodes, the others wait. What is damaged is encoded
    again, with a warning. Raises UserError if there is too little room, the folder cannot be written or a vector is not
    finite, ValueError if there are no passages or the encoder returns another shape.
    """
    if not len(store):
        raise ValueError("there are no passages to encode")
    found = open_vectors(place.folder, identity)
    if found is not None:
        return found
    with _lock(place):
        work = _Work(place, identity)  # another process may have gone on meanwhile
        work.encode_missing(encoder, store, show_progress)
    return VectorShards(place.folder, identity, work.in_order())


def open_vectors(folder: Path, identity: Identity) -> VectorShards | None:
    """The stored vectors; None if some are missing, or are not what was written."""
    record = read_record(folder)
    if record is None or record[0] != identity:
        return None
    shards = unbroken(folder, identity, record[1])
    if len(shards) < identity.shards:
        return None
    if shards != record[1]:  # copied files have other times: they were hashed for the last time, if this can be written
        with contextlib.suppress(UserError):
            write_record(folder, identity, shards)
    return VectorShards(folder, identity, [shards[number] for number in range(identity.shards)])


def missing_passages(folder: Path, identity: Identity) -> int:
    """Passages whose vectors have still to be made."""
    record = read_record(folder)
    done = unbroken(folder, identity, record[1]) if record and record[0] == identity else {}
    return identity.count - sum(len(identity.rows_of(number)) for number in done)


def forget_changed(folder: Path) -> None:
    """Hashes all shards, and strikes those from the record that are not what was written, with a warning."""
    if record := read_record(folder):
        identity, shards = record
        whole = unbroken(folder, identity, shards, verify=True)
        for number in sorted(shards.keys() - whole.keys()):
            warn(f"the vectors in {folder / file_name(number)} are damaged: encoding those passages again")
        write_record(folder, identity, whole)


class _Work:
    """A folder of vectors that is being filled; the caller holds its lock."""

    def __init__(self, place: Place, identity: Identity):
        """Takes up the shards that are whole, and warns of those that are not."""
        self._place, self._identity = place, identity
        self._shards: dict[int, Shard] = {}
        record = read_record(place.folder)
        if record and record[0] == identity:
            self._shards = unbroken(place.folder, identity, record[1])
            for number in sorted(record[1].keys() - self._shards.keys()):
                warn(f"the vectors in {place.folder / file_name(number)} are damaged: encoding those passages again")
        elif record or (place.folder / file_name(0)).exists():
            warn(f"the record of the vectors in {place.folder} is damaged: encoding again")

    def in_order(self) -> list[Shard]:
        return [self._shards[number] for number in range(self._identity.shards)]

    def encode_missing(self, encoder: PassageEncoder, store: PassageStore, show_progress: bool) -> None:
        """Encodes shard after shard, and records each."""
        identity = self._identity
        missing = [number for number in range(identity.shards) if number not in self._shards]
        left = sum(len(identity.rows_of(number)) for number in missing)
        check_room(self._place.folder, left * identity.bytes_of_passage, self._place.mend)
        with progress(
            desc="encoding",
            total=len(store),
            initial=len(store) - left,
            unit=" passages",
            shown=show_progress,
        ) as bar:
            for number in missing:
                rows, began = identity.rows_of(number), time.perf_counter()
                tokens = encoder.passage_tokens([store[row].embedder_text for row in rows])
                vectors = self._checked(encoder.encode_tokens(tokens, advance=bar.update), len(rows))
                seconds = time.perf_counter() - began
                self._keep(number, vectors, seconds, sum(map(len, tokens)))

    def _checked(self, vectors: np.ndarray, count: int) -> Float32[np.ndarray, "n E"]:
        vectors = np.asarray(vectors, np.float32)
        shape = (count, self._identity.width)
        if vectors.shape != shape:
            raise ValueError(f"the encoder returned an array of shape {vectors.shape} where {shape} was expected")
        if not np.isfinite(vectors).all():
            fault = "the embedder returned passage vectors that are not finite"
            raise UserError(f"{fault}: check its weights or use --dtype=float32")
        return vectors

    def _keep(self, number: int, vectors: Float32[np.ndarray, "n E"], seconds: float, tokens: int) -> None:
        """Puts a shard on disk, and only then says that it is there."""
        path = self._place.folder / file_name(number)
        part = path.with_suffix(".part")
        stored = as_stored(vectors, self._identity.dtype)
        with _storing(self._place):
            try:
                with open(part, "wb") as file:
                    np.lib.format.write_array(file, stored, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())  # else the rename can reach the disk before the bytes do
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        self._shards[number] = Shard(Seal.of(path), seconds, tokens, longest_of(as_float32(stored)))
        write_record(self._place.folder, self._identity, self._shards)


def _storing(place: Place) -> contextlib.AbstractContextManager[None]:
    return storing("the passage vectors", place.folder, place.mend)


def _lock(place: Place) -> BinaryIO:
    with _storing(place):
        return lock_file(place.folder / ".lock", "another process is encoding these passages: waiting for it")
