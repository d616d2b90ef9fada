"""Passages to vectors, once per (corpus, embedder), kept on disk.

    cache_dir/<key>/vectors.npy    float32 [P, E], opened memory-mapped
    cache_dir/<key>/meta.json      what the key was made of, P, E, seconds, tokens, sha256 of vectors.npy
    cache_dir/<key>.partial/       the same while it is being written, with progress.json instead of meta.json
    cache_dir/<key>.lock           held by the one process that writes

Choices. Texts are encoded longest first in chunks of fixed content: a batch then holds texts of like length,
memory runs out at the start or not at all, and a resumed run encodes the same batches, so it ends with the
same bytes. A chunk counts as done only after its vectors have reached the disk. The finished folder appears
by one rename, and its hash is checked each time it is opened.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypedDict

import numpy as np
from jaxtyping import Float, Float32

from ragjax.data.passages import PassageStore
from ragjax.errors import UserError
from ragjax.files import caching, lock_file, read_json, sha256_file, write_json
from ragjax.voice import progress

CHUNK = 512  # texts between two records of progress: seconds of work on a laptop
_LAYOUT = 1  # part of the key: raise it when files of another kind are written


@dataclass(frozen=True)
class EncodedCorpus:
    """vectors: a read-only memory map. seconds, tokens: what encoding them has cost, in this process or in an earlier
    one. cached: True if nothing was encoded now.
    """

    vectors: Float32[np.memmap, "P E"]
    seconds: float
    tokens: int
    cached: bool


# n texts -> their vectors, of any float type.
Encode = Callable[[list[str]], Float[np.ndarray, "n E"]]


class _Identity(TypedDict):
    """What the key of stored vectors is made of."""

    layout: int
    texts: str
    embedder: str
    count: int
    width: int


class _Progress(TypedDict):
    """progress.json."""

    plan: dict[str, object]
    chunks: int
    seconds: float
    tokens: int


def encode_corpus(
    encode: Encode,
    store: PassageStore,
    key: str,
    cache_dir: Path,
    width: int,
    count_tokens: Callable[[list[str]], int],
    show_progress: bool = True,
) -> EncodedCorpus:
    """Vectors [P, E] of the P passages, from the cache or encoded now, beginning where a killed process stopped.

    encode: n texts -> [n, E] float32, where E is `width`.  key: names everything about the embedder that
    shapes its vectors of passages (weights' hash, dtype, longest input, prefix).  count_tokens: n texts -> tokens
    they are encoded as, for the cost.

    Several processes may ask for the same vectors at once: one encodes, the others wait. A damaged cache is
    encoded again, with a warning. Raises UserError if the cache cannot be written or a vector is not finite,
    ValueError if there are no passages or `encode` returns another shape.
    """
    if not len(store):
        raise ValueError("there are no passages to encode")
    identity: _Identity = {
        "layout": _LAYOUT,
        "texts": store.content_hash,
        "embedder": key,
        "count": len(store),
        "width": width,
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    folder = Path(cache_dir) / name
    found = _open_finished(folder, identity)
    if found:
        return found
    with _lock(folder.with_name(f"{name}.lock")):
        found = _open_finished(folder, identity)  # another process may have written it meanwhile
        if found:
            return found
        if folder.exists():
            warnings.warn(f"the stored passage vectors in {folder} are damaged: encoding again", stacklevel=2)
            with _storing(folder):
                shutil.rmtree(folder)
        work = _Partial(folder.with_name(f"{name}.partial"), identity)
        work.encode_rest(encode, store, show_progress, count_tokens)
        work.finish(folder)
    vectors = _open_vectors(folder / "vectors.npy", "r", identity)
    return EncodedCorpus(vectors, work.seconds, work.tokens, cached=False)


class _Partial:
    """Vectors that are being written, in a folder of their own; the caller holds the lock."""

    def __init__(self, folder: Path, identity: _Identity):
        """Takes up what the folder holds if it is this work, and starts afresh if not."""
        self.folder, self.identity = folder, identity
        plan = {**identity, "chunk": CHUNK}
        try:
            progress: _Progress = read_json(folder / "progress.json")
            if progress["plan"] != plan:
                raise ValueError("other work")
            self.vectors = _open_vectors(folder / "vectors.npy", "r+", identity)
        except (UserError, OSError, ValueError, KeyError, TypeError):
            progress = {"plan": plan, "chunks": 0, "seconds": 0.0, "tokens": 0}
            self.vectors = self._allocate()
        self.progress = progress

    def _allocate(self) -> Float32[np.memmap, "P E"]:
        shutil.rmtree(self.folder, ignore_errors=True)
        path = self.folder / "vectors.npy"
        shape = (self.identity["count"], self.identity["width"])
        with _storing(path):
            try:
                self.folder.mkdir(parents=True)
                vectors = np.lib.format.open_memmap(path, "w+", np.float32, shape)
                _reserve(path)
            except OSError:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
        return vectors

    @property
    def seconds(self) -> float:
        return self.progress["seconds"]

    @property
    def tokens(self) -> int:
        return self.progress["tokens"]

    def encode_rest(
        self,
        encode: Encode,
        store: PassageStore,
        show_progress: bool,
        count_tokens: Callable[[list[str]], int],
    ) -> None:
        """Encodes the chunks that are not done and records each of them."""
        order = np.argsort([-len(passage.embedder_text) for passage in store], kind="stable")
        done = self.progress["chunks"] * CHUNK
        with progress(
            desc="encoding",
            total=len(store),
            initial=min(done, len(store)),
            unit=" passages",
            shown=show_progress,
        ) as bar:
            for start in range(done, len(store), CHUNK):
                rows = order[start : start + CHUNK]
                chunk = [store[row].embedder_text for row in rows]
                began = time.perf_counter()
                self.vectors[rows] = self._checked(encode(chunk), len(chunk))
                seconds = time.perf_counter() - began
                self._record(seconds, count_tokens(chunk))
                bar.update(len(chunk))

    def _checked(self, vectors: np.ndarray, count: int) -> Float32[np.ndarray, "n E"]:
        vectors = np.asarray(vectors, np.float32)
        shape = (count, self.identity["width"])
        if vectors.shape != shape:
            raise ValueError(f"encode returned an array of shape {vectors.shape} where {shape} was expected")
        if not np.isfinite(vectors).all():
            fault = "the embedder returned passage vectors that are not finite"
            raise UserError(f"{fault}: check its weights or use --dtype=float32")
        return vectors

    def _record(self, seconds: float, tokens: int) -> None:
        """Puts the chunk's vectors on disk, and only then says that they are there."""
        with _storing(self.folder):
            self.vectors.flush()
        self.progress = {
            **self.progress,
            "chunks": self.progress["chunks"] + 1,
            "seconds": self.progress["seconds"] + seconds,
            "tokens": self.progress["tokens"] + tokens,
        }
        write_json(self.folder / "progress.json", self.progress, everywhere=True)

    def finish(self, folder: Path) -> None:
        """Turns the partial folder into the finished one."""
        del self.vectors
        meta = {**self.identity, "seconds": self.seconds, "tokens": self.tokens}
        meta["sha256"] = sha256_file(self.folder / "vectors.npy")
        write_json(self.folder / "meta.json", meta, everywhere=True)
        with _storing(folder):
            os.rename(self.folder, folder)
            (folder / "progress.json").unlink(missing_ok=True)


def _open_finished(folder: Path, identity: _Identity) -> EncodedCorpus | None:
    """The stored vectors; None if there are none or they are not what was written."""
    try:
        meta = read_json(folder / "meta.json")
        if any(meta[name] != value for name, value in identity.items()):
            return None
        path = folder / "vectors.npy"
        if sha256_file(path) != meta["sha256"]:
            return None
        return EncodedCorpus(_open_vectors(path, "r", identity), meta["seconds"], meta["tokens"], cached=True)
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None


def _open_vectors(path: Path, mode: str, identity: _Identity) -> Float32[np.memmap, "P E"]:
    """The memory map of a vectors file. Raises ValueError if it is not a float32 array [P, E]."""
    vectors = np.lib.format.open_memmap(path, "r")  # "r+" would fill a file that is too short with zeros
    if vectors.dtype != np.float32 or vectors.shape != (identity["count"], identity["width"]):
        raise ValueError(f"{path} does not hold float32 vectors [{identity['count']}, {identity['width']}]")
    return vectors if mode == "r" else np.lib.format.open_memmap(path, mode)


def _reserve(path: Path) -> None:
    """Claims the blocks of a file: else a full disk would end the process by SIGBUS at some later write."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _storing(path: Path) -> contextlib.AbstractContextManager[None]:
    return caching("the passage vectors", path)


def _lock(path: Path) -> BinaryIO:
    with _storing(path):
        return lock_file(path, "another process is encoding these passages: waiting for it")
