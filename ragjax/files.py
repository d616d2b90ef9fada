"""Small file helpers of the whole house: atomic writes of files and folders, JSON, hashes, and the cache.

Of several processes the first alone writes (`ragjax.voice`): what the others are told to write is dropped, but for the
cache's files (`everywhere`), as each host has a cache of its own.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ragjax.errors import UserError, reason
from ragjax.voice import is_first, say

Parsed = TypeVar("Parsed")


def write_atomic(path: str | os.PathLike, content: bytes | str, everywhere: bool = False) -> None:
    """Writes `content` (str as UTF-8) to `path`; readers see the old file or the whole new one, never a part.

    The parent folder is made when missing. Raises UserError when the file cannot be written (a full disk, no
    permission); the old file, if any, then stands unchanged and nothing is left beside it.
    """
    if not (everywhere or is_first()):
        return
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # else the rename can reach the disk before the bytes do
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def append_line(path: str | os.PathLike, line: str) -> None:
    """Appends a line; file and parent folder are made when missing.

    Raises UserError when it cannot be written; a part of the line may then stand at the file's end, without its
    newline.
    """
    if not is_first():
        return
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise _unwritable(path, error) from error


def sha256_file(path: str | os.PathLike) -> str:
    """The sha256 of a file's bytes, as 64 hexadecimal digits. Raises UserError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(Path(path), error) from error


def read_json(path: str | os.PathLike) -> Any:
    """The value that a JSON file holds. Raises UserError, naming the file, when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(Path(path), error) from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is not valid JSON ({error}): repair the file or make it anew") from error


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """`read_json` of a file that must hold an object. Raises UserError, naming the file, for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object: repair the file or make it anew")
    return value


def read_json_lines(path: str | os.PathLike) -> list[Any]:
    """The values of a file with one JSON value a line. Raises UserError, naming file and line, as `read_json` does.

    Lines end at "\\n" alone: U+2028 and its like may stand inside a text.
    """
    values = []
    try:
        with open(path, "rb") as file:
            for line in file:
                values.append(json.loads(line))
    except OSError as error:
        raise _unreadable(Path(path), error) from error
    except ValueError as error:
        raise UserError(
            f"{path} line {len(values) + 1} is not valid JSON ({error}): repair the file or make it anew"
        ) from error
    return values


def read_whole_lines(
    path: str | os.PathLike, parse: Callable[[Any], Parsed], mend: str
) -> Iterator[tuple[str, Parsed]]:
    """Each (line, what `parse` makes of its JSON value) of a file that grows line by line, up to one that was cut off.

    Raises UserError, naming file, line and `mend`, for a line that `parse` cannot read; nothing if there is no file.
    """
    if not Path(path).exists():
        return
    number = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                number += 1
                if not line.endswith(b"\n"):
                    return
                yield line.decode(), parse(json.loads(line))
    except OSError as error:
        raise _unreadable(Path(path), error) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        fault = f"it lacks {error}" if isinstance(error, KeyError) else reason(error)
        raise UserError(f"{path} line {number} is damaged ({fault}): {mend}") from error


def write_json(path: str | os.PathLike, value: Any, everywhere: bool = False) -> None:
    """Writes `value` as indented UTF-8 JSON with a final newline, atomically.

    Raises UserError as `write_atomic` does, and ValueError for NaN or infinity, which JSON lacks: use None.
    """
    write_atomic(path, _json_text(value), everywhere)


# ---- folders -----------------------------------------------------------------------------------------------

_COPIED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class PlannedFile:
    """A file that is still to be written: its `path` inside its folder, its `size` in bytes, and its content, made
    piece by piece when it is written.
    """

    path: str
    size: int
    pieces: Callable[[], Iterable[bytes | memoryview]]


def plan_text(path: str, text: str) -> PlannedFile:
    """A file with this text."""
    data = text.encode()
    return PlannedFile(path, len(data), lambda: [data])


def plan_json(path: str, value: Any) -> PlannedFile:
    """A file with this value, as `write_json` writes it."""
    return plan_text(path, _json_text(value))


def plan_copy(path: str, source: Path) -> PlannedFile:
    """A copy of the file `source`, or of what it links to."""
    try:
        size = source.stat().st_size
    except OSError as error:
        raise _unreadable(source, error) from error
    return PlannedFile(path, size, lambda: read_pieces(source, 0, size))


def read_pieces(path: Path, start: int, size: int) -> Iterator[bytes]:
    """`size` bytes of a file from `start` on, a few megabytes at a time. Raises UserError when they cannot be had."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            while size:
                piece = file.read(min(size, _COPIED_AT_ONCE))
                if not piece:
                    raise UserError(f"{path} has become shorter while it was read: run the same command again")
                size -= len(piece)
                yield piece
    except OSError as error:
        raise _unreadable(path, error) from error


def write_folder(folder: str | os.PathLike, files: Sequence[PlannedFile], everywhere: bool = False) -> None:
    """Writes a new folder: under its name stands either nothing or the whole of it.

    The files go into a hidden folder beside it, which is renamed at the end; what a killed process left there is
    removed first. Raises UserError when the folder exists, the disk has too little room for it, another process is
    writing it, or a file cannot be made or written.
    """
    if not (everywhere or is_first()):
        return
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.ragjax-part") if folder.name else folder
    _refuse_existing(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part, folder):
            try:
                _refuse_existing(folder)  # another process may have finished it since
                _clear(part)
                _check_room(folder, sum(file.size for file in files))
                for file in files:
                    _write_planned(part / file.path, file)
                os.rename(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)  # gone when all went well
    except OSError as error:
        raise _unwritable(folder, error) from error


@contextlib.contextmanager
def _locked(part: Path, folder: Path) -> Iterator[None]:
    """Makes `part` and holds it for this process alone; the lock goes with the process."""
    part.mkdir(exist_ok=True)
    handle = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {folder}: wait for it or choose another folder") from None
        yield
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _refuse_existing(folder: Path) -> None:
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already: choose another folder, or remove it first")


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise UserError(
            f"{folder} needs {needed:,} bytes, and {free:,} are free: free some space or choose another folder"
        )


def _write_planned(path: Path, planned: PlannedFile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for piece in planned.pieces():
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())  # else the rename can reach the disk before the bytes do
        if file.tell() != planned.size:
            raise ValueError(f"{planned.path} has {file.tell():,} bytes where {planned.size:,} were planned")


# ---- records by key ----------------------------------------------------------------------------------------


class KeyedRecords:
    """Lists of numbers by key, kept in a file that only grows: one JSON object {key: numbers} a line.

    What is added at once stands in one line, which a kill leaves whole or not at all. Float32 values come back as they
    were.
    """

    def __init__(self, path: str | os.PathLike):
        """Reads the file if there is one, without a last line that was cut off.

        Raises UserError where it is damaged otherwise.
        """
        self._path = Path(path)
        self._records: dict[str, list[float]] = {}
        self.lines = 0
        if self._path.exists():
            self.rewind(None)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> list[float]:
        return self._records[key]

    def __len__(self) -> int:
        return len(self._records)

    def add(self, records: Mapping[str, list[float]]) -> None:
        """Keeps and writes new records as one line. Raises UserError when they cannot be written."""
        append_line(self._path, json.dumps(records))
        self._records.update(records)
        self.lines += 1

    def rewind(self, lines: int | None) -> None:
        """Keeps the file's first `lines` lines (None: all that are whole) and forgets the others."""
        if not self._path.exists():
            return
        try:
            found = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in found if line.endswith("\n")][:lines]
            self._records = {key: values for line in kept for key, values in json.loads(line).items()}
        except (ValueError, AttributeError) as error:  # also bytes that are no text
            raise UserError(f"{self._path} is damaged ({error}): delete it, it is then made anew") from error
        if len(kept) < len(found):
            write_atomic(self._path, "".join(kept))
        self.lines = len(kept)


# ---- the cache ---------------------------------------------------------------------------------------------


def default_cache_dir() -> Path:
    """$RAGJAX_CACHE, else ~/.cache/ragjax."""
    return Path(os.environ.get("RAGJAX_CACHE") or Path.home() / ".cache" / "ragjax")


@contextlib.contextmanager
def caching(what: str, path: Path) -> Iterator[None]:
    """Rewords what the file system refuses while `what` (a plural, "the passage vectors") is put into the cache."""
    try:
        yield
    except OSError as error:
        fault = f"{what} cannot be stored at {path} ({error.strerror or error})"
        raise UserError(f"{fault}: make room there or set RAGJAX_CACHE to a folder with room") from error


def lock_file(path: Path, waiting: str) -> BinaryIO:
    """An exclusive lock on the file, which is made when missing; `waiting` goes to stderr if another process has it.

    Closing the file gives the lock back, and so does the end of the process, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "wb")  # noqa: SIM115  the caller closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(waiting, to_stderr=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} could not be read ({error.strerror or error}): check its name and permissions")


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} could not be written ({error.strerror or error}): free some space or choose another folder"
    )
