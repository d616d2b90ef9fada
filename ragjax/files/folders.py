"""New folders, planned file by file and written whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragjax.errors import UserError
from ragjax.files.json_values import json_text
from ragjax.files.locks import take_lock
from ragjax.files.plain import read_pieces, unreadable, unwritable
from ragjax.voice import is_first


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
    return plan_text(path, json_text(value))


def plan_copy(path: str, source: Path) -> PlannedFile:
    """A copy of the file `source`, or of what it links to."""
    try:
        size = source.stat().st_size
    except OSError as error:
        raise unreadable(source, error) from error
    return PlannedFile(path, size, lambda: read_pieces(source, 0, size))


def write_folder(folder: str | os.PathLike, files: Sequence[PlannedFile], everywhere: bool = False) -> None:
    """Writes a new folder: under its name stands either nothing or the whole of it.

    The files go into a hidden folder beside it, which is renamed at the end; what a killed process left there is
    removed first. Raises UserError when the folder exists, the disk has too little room for it, another process is
    writing it, or a file cannot be made or written.
    """
    if not (everywhere or is_first()):
        return
    with new_folder(folder) as part:
        check_room(Path(folder), sum(file.size for file in files))
        for file in files:
            _write_planned(part / file.path, file)


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike) -> Generator[Path, None, None]:
    """A hidden folder beside `folder`, to be filled by the block; at its end it is renamed to `folder`.

    An error in the block leaves neither of them, and what a killed process left is removed first. Files should have
    reached the disk before the block ends. Raises UserError as `write_folder` does.
    """
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.ragjax-part") if folder.name else folder
    _refuse_existing(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part, folder):
            try:
                _refuse_existing(folder)  # another process may have finished it since
                _clear(part)
                yield part
                os.rename(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)  # gone when all went well
    except OSError as error:
        raise unwritable(folder, error) from error


@contextlib.contextmanager
def _locked(part: Path, folder: Path) -> Generator[None, None, None]:
    """Makes `part` and holds it for this process alone; the lock goes with the process."""
    part.mkdir(exist_ok=True)
    handle = os.open(part, os.O_RDONLY)
    try:
        take_lock(handle, f"another process is writing {folder}: wait for it or choose another folder")
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


def free_bytes(path: Path) -> int:
    """On the disk of a file or folder that need not be there yet."""
    path = path.absolute()
    return shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists())).free


def check_room(folder: Path, needed: int, mend: str = "choose another folder") -> None:
    """Raises UserError where the disk of a folder has too little room for what is to stand in it.

    mend: what to do instead of freeing some.
    """
    free = free_bytes(folder)
    if free < needed:
        raise UserError(f"{folder} needs {needed:,} bytes, and {free:,} are free: free some space or {mend}")


def _write_planned(path: Path, planned: PlannedFile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for piece in planned.pieces():
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())  # else the rename can reach the disk before the bytes do
        if file.tell() != planned.size:
            raise ValueError(f"{planned.path} has {file.tell():,} bytes where {planned.size:,} were planned")
