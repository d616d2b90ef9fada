"""Vectors of a corpus in shards: one folder of files of equally many passages each, memory-mapped.

    FOLDER/00000.npy     [n, E] float32; or uint16, the upper half of a float32, which is what a bfloat16 is
    FOLDER/shards.json   what they were made of; of each shard its seal, its seconds and tokens, its longest vector

The cache and the folder of an index both hold vectors in this way. Opening compares each file with its seal, so that
vectors which nobody has touched are not read. A shard counts once it stands in shards.json.
"""

import contextlib
import dataclasses
import hashlib
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Int

from ragjax.errors import UserError
from ragjax.files import Seal, give_back, read_json_object, write_json

# Passages of a shard: a minute or two of work on a laptop, which is what a killed run loses.
ROWS = 4096
# Numbers of a stored vector -> how they lie in the file. numpy's own format knows no bfloat16.
STORED_AS = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.uint16)}
RECORD = "shards.json"
_LAYOUT = 2  # raise it when files of another kind are written
_MAPPED = 256  # shards that are mapped at once: each takes one of the files that a process may hold
# Rows that are read before their pages are given back: each may bring a megabyte of neighbours into this process's
# memory, where the system reads files in pieces of that size.
_HELD = 64


@dataclasses.dataclass(frozen=True)
class Identity:
    """What stored vectors were made of."""

    texts: str  # content_hash of the corpus
    embedder: Mapping[str, Any]  # what shapes its vectors of passages: `Embedder.passage_record`
    count: int  # P
    width: int  # E
    dtype: str  # of the stored vectors, of STORED_AS
    rows: int  # passages of a shard; the last has the rest

    @property
    def key(self) -> str:
        """A name for a folder of them."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()[:32]

    @property
    def shards(self) -> int:
        """How many there are in all."""
        return -(-self.count // self.rows)

    @property
    def bytes_of_passage(self) -> int:
        """On disk."""
        return self.width * STORED_AS[self.dtype].itemsize

    def rows_of(self, number: int) -> range:
        """The passage rows of a shard."""
        return range(number * self.rows, min((number + 1) * self.rows, self.count))

    def as_json(self) -> dict[str, Any]:
        return {"layout": _LAYOUT, **dataclasses.asdict(self)}

    @classmethod
    def read(cls, value: Mapping[str, Any]) -> "Identity":
        """From JSON. Raises ValueError, KeyError or TypeError where it is none of this layout."""
        if value["layout"] != _LAYOUT:
            raise ValueError("another layout")
        found = cls(**{field.name: value[field.name] for field in dataclasses.fields(cls)})
        if found.dtype not in STORED_AS:
            raise ValueError(f"vectors of {found.dtype}")
        return found


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file, and what is known of its vectors."""

    seal: Seal
    seconds: float  # of encoding them
    tokens: int
    longest: float  # length of the longest vector

    def as_json(self) -> dict[str, Any]:
        own = {"seconds": self.seconds, "tokens": self.tokens, "longest": self.longest}
        return {**self.seal.as_json(), **own}

    @classmethod
    def read(cls, value: Mapping[str, Any]) -> "Shard":
        seal = Seal.read({field.name: value[field.name] for field in dataclasses.fields(Seal)})
        return cls(seal, float(value["seconds"]), int(value["tokens"]), float(value["longest"]))


def file_name(number: int) -> str:
    """Of a shard."""
    return f"{number:05d}.npy"


def read_record(folder: Path) -> tuple[Identity, dict[int, Shard]] | None:
    """What shards.json says: (what the vectors were made of, its shards by number); None where it is missing or
    damaged.
    """
    try:
        value = read_json_object(folder / RECORD)
        shards = {int(Path(shard["file"]).stem): Shard.read(shard) for shard in value["shards"]}
        return Identity.read(value), shards
    except (UserError, ValueError, KeyError, TypeError):
        return None


def write_record(folder: Path, identity: Identity, shards: Mapping[int, Shard]) -> None:
    """Puts them on disk as the shards that there are. Raises UserError where they cannot be written."""
    listed = [shards[number].as_json() for number in sorted(shards)]
    write_json(folder / RECORD, {**identity.as_json(), "shards": listed}, everywhere=True)


def unbroken(folder: Path, identity: Identity, shards: Mapping[int, Shard], verify: bool = False) -> dict[int, Shard]:
    """Those of the shards whose files are as they were written, under seals that hold now.

    verify: hash every file, also those whose size and time are as they were.
    """
    found = {}
    for number, shard in shards.items():
        with contextlib.suppress(UserError):  # the file is gone
            seal = shard.seal.renewed(folder, verify)
            if seal is not None and number < identity.shards:
                found[number] = dataclasses.replace(shard, seal=seal)
    return found


class VectorShards:
    """The stored vectors [P, E] of a whole corpus (a `VectorStore`): only what is asked for is read."""

    def __init__(self, folder: Path, identity: Identity, shards: Sequence[Shard]):
        """shards: all of them, in order."""
        self.folder, self.identity, self._shards = folder, identity, shards
        self._mapped: dict[int, np.memmap] = {}
        self._read = 0  # rows since pages were given back

    def __len__(self) -> int:
        return self.identity.count

    @property
    def width(self) -> int:
        return self.identity.width

    @property
    def longest(self) -> float:
        return max(shard.longest for shard in self._shards)

    @property
    def seconds(self) -> float:
        """What encoding them has taken, in this process and earlier ones."""
        return sum(shard.seconds for shard in self._shards)

    @property
    def tokens(self) -> int:
        """Tokens that the passages were encoded as."""
        return sum(shard.tokens for shard in self._shards)

    @property
    def sha256(self) -> str:
        """Of the hashes of all shards, in order."""
        return hashlib.sha256("".join(shard.seal.sha256 for shard in self._shards).encode()).hexdigest()

    def vectors_of(self, passage_rows: Sequence[int] | Int[np.ndarray, "*rows"]) -> Float32[np.ndarray, "*rows E"]:
        rows = np.asarray(passage_rows, np.int64)
        flat = rows.ravel()
        if flat.size and (flat.min() < 0 or flat.max() >= len(self)):
            raise IndexError(f"passage rows go from 0 to {len(self) - 1}")
        numbers, places = np.divmod(flat, self.identity.rows)
        found = np.empty((len(flat), self.width), np.float32)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            found[chosen] = as_float32(self._kept(number)[places[chosen]])
        self._read += len(flat)
        if self._read > _HELD:
            self._give_back()
        return found.reshape(*rows.shape, self.width)

    def blocks(self) -> Iterator[Float32[np.ndarray, "n E"]]:
        for number in range(self.identity.shards):
            yield as_float32(self._map(number))

    def _kept(self, number: int) -> np.memmap:
        """`_map`, kept for the next time."""
        if number not in self._mapped:
            if len(self._mapped) == _MAPPED:
                self._mapped.clear()
            self._mapped[number] = self._map(number)
        return self._mapped[number]

    def _give_back(self) -> None:
        self._read = 0
        for vectors in self._mapped.values():
            if isinstance(vectors.base, mmap.mmap):
                give_back(vectors.base)

    def _map(self, number: int) -> np.memmap:
        """A shard as it lies in its file. Raises UserError where that is not what its seal has said."""
        path, rows = self.folder / file_name(number), self.identity.rows_of(number)
        try:
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} was changed while it was in use ({error}): run the same command again") from error
        if vectors.shape != (len(rows), self.width) or vectors.dtype != STORED_AS[self.identity.dtype]:
            raise UserError(f"{path} was changed while it was in use: run the same command again")
        return vectors


def as_stored(vectors: Float32[np.ndarray, "n E"], dtype: str) -> np.ndarray:
    """Vectors as they lie in a file."""
    if dtype == "float32":
        return vectors
    return vectors.astype(ml_dtypes.bfloat16).view(np.uint16)


def as_float32(stored: np.ndarray) -> Float32[np.ndarray, "n E"]:
    """What lies in a file, as numbers: a view where they are float32."""
    if stored.dtype == np.float32:
        return stored
    return (stored.astype(np.uint32) << 16).view(np.float32)
