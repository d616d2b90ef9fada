"""A corpus of any size on disk, memory-mapped: what is not read takes no memory.

    FOLDER/passages-00000.arrow   Arrow IPC file of about SHARD passages: id, title, text, document, start
    FOLDER/ids.keys.npy           uint64 [P], a hash of each id, ascending
    FOLDER/ids.rows.npy           int64 [P], the row of the passage that each of them belongs to
    FOLDER/store.json             the number of passages, the two hashes of a `PassageStore`, the files' seals

document and start say where a passage was cut from: the id of the text that it is a part of, and its first character
there. Writing keeps 8 bytes a passage in memory, and 24 while the ids are sorted; ids that occur twice are found then.
"""

import array
import contextlib
import hashlib
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int64

from ragjax.data.passages import RecordsHash, TextsHash
from ragjax.data.questions import Passage
from ragjax.errors import UserError
from ragjax.files import Seal, give_back, map_file, read_json_object, sync, write_json
from ragjax.files.plain import unwritable

SHARD = 1 << 18  # passages in a file
_BATCH = 1 << 12  # of them in a record batch, which is held in memory until it is written,
_LONGEST = 1 << 25  # or fewer, where they have so many characters
_HELD = 1 << 12  # passages that are read before their pages are given back
_LAYOUT = 1
RECORD, _KEYS, _ROWS = "store.json", "ids.keys.npy", "ids.rows.npy"


def is_arrow_store(folder: Path) -> bool:
    """Whether a folder holds a store."""
    return (folder / RECORD).is_file()


class ArrowStore:
    """The passages of a folder that `ArrowWriter` wrote, a `PassageStore`."""

    def __init__(self, folder: str | Path, verify: bool = False):
        """Opens it; a file whose size and time are as they were is not read.

        verify: read and compare all of it. Raises UserError, naming the file, where one is missing or damaged.
        """
        self.folder = Path(folder)
        record = _checked_record(self.folder, verify)
        self.content_hash: str = record["content_hash"]
        self.records_hash: str = record["records_hash"]
        self._shards = _mapped(self.folder, [file["file"] for file in record["shards"]])
        self._table = _as_table(self._shards)
        self._read = 0  # passages since pages were given back
        self._columns = {name: self._table[name] for name in self._table.column_names}
        self._keys, self._key_rows = (np.load(self.folder / name, mmap_mode="r") for name in (_KEYS, _ROWS))

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: SupportsIndex) -> Passage:
        return Passage(*self._values(row, ("id", "title", "text")))

    def origin(self, row: SupportsIndex) -> tuple[str, int]:
        """(the document that a passage was cut from, the character there that it begins with); ("", 0): it is whole."""
        document, start = self._values(row, ("document", "start"))
        return document, start

    def _values(self, row: SupportsIndex, names: Iterable[str]) -> list[Any]:
        place = int(row)
        if not 0 <= place < len(self):
            raise IndexError(f"passage rows are 0 to {len(self) - 1}, not {place}")
        values = [self._columns[name][place].as_py() for name in names]
        self._count(1)
        return values

    def _count(self, passages: int) -> None:
        """Gives pages back after every so many passages that were read."""
        self._read += passages
        if self._read >= _HELD:
            self._read = 0
            for mapped in self._shards.values():
                give_back(mapped)

    def __iter__(self) -> Iterator[Passage]:
        for batch in self._table.select(["id", "title", "text"]).to_batches():
            yield from map(Passage, *(column.to_pylist() for column in batch.columns))
            self._count(len(batch))

    def __contains__(self, identity: object) -> bool:
        return isinstance(identity, str) and self._find(identity) is not None

    def rows_of(self, ids: Iterable[str]) -> Int64[np.ndarray, " n"]:
        rows = []
        for identity in ids:
            row = self._find(identity)
            if row is None:
                raise KeyError(identity)
            rows.append(row)
        return np.array(rows, np.int64)

    def ids_of(self, passage_rows: Iterable[SupportsIndex]) -> list[str]:
        return [self._values(row, ("id",))[0] for row in passage_rows]

    def _find(self, identity: str) -> int | None:
        key = np.uint64(_key(identity))
        first, behind = (int(np.searchsorted(self._keys, key, side)) for side in ("left", "right"))
        rows = self._key_rows[first:behind].tolist()  # several only where hashes collide
        return next((row for row in rows if self._values(row, ("id",))[0] == identity), None)


class ArrowWriter:
    """Writes a store passage by passage into a folder of its own. Nothing can be opened before `finish`."""

    def __init__(self, folder: str | Path):
        """Makes the folder, which may not hold a store yet. Raises UserError where it cannot be made."""
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        self._content, self._records = TextsHash(), RecordsHash()
        self._keys = array.array("Q")
        self._batch: list[tuple[Any, ...]] = []
        self._characters = 0
        self._shard: _Shard | None = None
        self._seals: list[Seal] = []

    def __len__(self) -> int:
        """Passages so far."""
        return len(self._keys)

    def add(self, passage: Passage, document: str = "", start: int = 0) -> None:
        """Appends a passage; document, start: what it was cut from, and the character there that it begins with.

        Raises UserError when it cannot be written, or a text holds half of a surrogate pair.
        """
        try:
            self._keys.append(_key(passage.id))
            self._content.add(passage.embedder_text)
        except UnicodeEncodeError:
            raise UserError(
                f"the passage with the id {passage.id!r} holds half of a surrogate pair: write the whole character"
            ) from None
        self._records.add(passage.id, passage.title, passage.text)
        self._batch.append((passage.id, passage.title, passage.text, document, start))
        self._characters += len(passage.text)
        if len(self._batch) == _BATCH or self._characters >= _LONGEST:
            self._flush()

    def finish(self) -> ArrowStore:
        """Writes what is left, and opens the store.

        Raises UserError for a store without passages, and for an id that occurs twice.
        """
        if not len(self):
            raise UserError("there are no passages: give the corpus at least one")
        self._flush()
        self._close_shard()
        keys = np.frombuffer(self._keys, np.uint64)
        order = np.argsort(keys, kind="stable")
        ascending = keys[order]
        table = _as_table(_mapped(self.folder, [seal.file for seal in self._seals]))
        _refuse_repeated(table["id"], ascending, order)
        files = [_save(self.folder / name, values) for name, values in ((_KEYS, ascending), (_ROWS, order))]
        record = {
            "layout": _LAYOUT,
            "passages": len(keys),
            "content_hash": self._content.hexdigest(),
            "records_hash": self._records.hexdigest(),
            "shards": [seal.as_json() for seal in self._seals],
            "ids": [seal.as_json() for seal in files],
        }
        write_json(self.folder / RECORD, record, everywhere=True)
        return ArrowStore(self.folder)

    def _flush(self) -> None:
        if not self._batch:
            return
        if self._shard is None:
            self._shard = _Shard(self.folder / f"passages-{len(self._seals):05d}.arrow")
        self._shard.write(self._batch)
        self._batch, self._characters = [], 0
        if self._shard.passages >= SHARD:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._seals.append(self._shard.close())
            self._shard = None


class _Shard:
    """A file that is being written."""

    def __init__(self, path: Path):
        import pyarrow as pa

        self.path, self.passages = path, 0
        self._schema = pa.schema(
            [
                ("id", pa.string()),
                ("title", pa.string()),
                ("text", pa.large_string()),  # a batch of whole books is more than 2 GiB
                ("document", pa.string()),
                ("start", pa.int64()),
            ]
        )
        try:
            self._file = pa.OSFile(str(path), "wb")
            self._writer = pa.ipc.new_file(self._file, self._schema)
        except OSError as error:
            raise unwritable(path, error) from error

    def write(self, rows: Sequence[tuple[Any, ...]]) -> None:
        import pyarrow as pa

        columns = map(pa.array, zip(*rows, strict=True), self._schema.types)
        try:
            self._writer.write_batch(pa.record_batch(list(columns), schema=self._schema))
        except OSError as error:
            raise unwritable(self.path, error) from error
        self.passages += len(rows)

    def close(self) -> Seal:
        try:
            self._writer.close()
            self._file.close()
            sync(self.path)
        except OSError as error:
            raise unwritable(self.path, error) from error
        return Seal.of(self.path)


def _checked_record(folder: Path, verify: bool) -> dict[str, Any]:
    """store.json of a store whose files are what was written; a copied file's new time is noted."""
    path = folder / RECORD
    record = read_json_object(path)
    try:
        if record["layout"] != _LAYOUT:
            raise UserError(f"{folder} was written by another version of ragjax: prepare the data again")
        seals = {part: [Seal.read(seal) for seal in record[part]] for part in ("shards", "ids")}
        renewed = {part: [seal.renewed(folder, verify) for seal in seals[part]] for part in seals}
        if record["passages"] < 1 or not all(type(record[name]) is str for name in ("content_hash", "records_hash")):
            raise TypeError("no passages or hashes")
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): prepare the data again") from error
    for part, found in renewed.items():
        for seal, kept in zip(seals[part], found, strict=True):
            if kept is None:
                raise UserError(f"{folder / seal.file} is not what was written: prepare the data again")
    if renewed != seals:
        record |= {part: [seal.as_json() for seal in found if seal] for part, found in renewed.items()}
        with contextlib.suppress(UserError):  # on a disk for reading alone it is hashed each time
            write_json(path, record, everywhere=True)
    return record


def _mapped(folder: Path, files: Iterable[str]) -> dict[Path, mmap.mmap]:
    """The shards' bytes, by file."""
    shards = {}
    for path in (folder / name for name in files):
        try:
            shards[path] = map_file(path)
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error
    return shards


def _as_table(shards: Mapping[Path, mmap.mmap]) -> Any:
    """All shards as one table, which copies nothing of them."""
    import pyarrow as pa

    tables = []
    for path, mapped in shards.items():
        try:
            tables.append(pa.ipc.open_file(pa.py_buffer(mapped)).read_all())
        except (OSError, pa.ArrowInvalid) as error:
            raise _damaged(path, error) from error
    return pa.concat_tables(tables)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({error}): prepare the data again")


def _refuse_repeated(ids: Any, keys: np.ndarray, rows: np.ndarray) -> None:
    """keys: the hashes of all ids, ascending; rows: the passages of those, in file order where keys agree."""
    for key in np.unique(keys[1:][keys[1:] == keys[:-1]]):
        first_seen: dict[str, int] = {}
        for row in rows[np.searchsorted(keys, key, "left") : np.searchsorted(keys, key, "right")].tolist():
            first = first_seen.setdefault(ids[row].as_py(), row)
            if first != row:
                raise UserError(
                    f'the passages {first + 1:,} and {row + 1:,} have the same id "{ids[row].as_py()}": give every '
                    "passage an id of its own"
                )


def _save(path: Path, values: np.ndarray) -> Seal:
    try:
        np.save(path, values)
        sync(path)
    except OSError as error:
        raise unwritable(path, error) from error
    return Seal.of(path)


def _key(identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little")
