"""Files as bytes and text: atomic writes, lines appended, hashes, reading in pieces."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from ragjax.errors import UserError
from ragjax.voice import is_first

_READ_AT_ONCE = 1 << 24


def write_atomic(path: str | os.PathLike, content: bytes | str, everywhere: bool = False) -> None:
    """Writes `content` (str as UTF-8) to `path`; readers see the old file or the whole new one, never a part.

    The parent folder is made when missing. Raises UserError when the file cannot be written (a full disk, no
    permission); the old file, if any, then stands unchanged and nothing is left beside it.
    """
    if not (everywhere or is_first()):
        return
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")  # pids of several hosts may be the same
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
        raise unwritable(path, error) from error


def sync(path: Path) -> None:
    """Puts on the disk the bytes of a file that another library wrote: else a rename can reach it before they do.

    Raises OSError.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file. Raises UserError, naming it, where it cannot be read or is no such text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(Path(path), error) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it in UTF-8") from error


def remove(path: Path) -> None:
    """Removes a file of those that the first process alone writes; one that is not there is no fault."""
    if is_first():
        path.unlink(missing_ok=True)


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
        raise unwritable(path, error) from error


def sha256_file(path: str | os.PathLike) -> str:
    """The sha256 of a file's bytes, as 64 hexadecimal digits. Raises UserError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(Path(path), error) from error


def read_pieces(path: Path, start: int, size: int) -> Iterator[bytes]:
    """`size` bytes of a file from `start` on, a few megabytes at a time. Raises UserError when they cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            while size:
                piece = file.read(min(size, _READ_AT_ONCE))
                if not piece:
                    raise UserError(f"{path} became shorter while it was being read: run the same command again")
                size -= len(piece)
                yield piece
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> UserError:
    """What to raise where the system does not let a file be read."""
    return UserError(f"{path} could not be read ({error.strerror or error}): check its name and permissions")


def unwritable(path: Path, error: OSError) -> UserError:
    """What to raise where the system does not let a file or folder be written."""
    return UserError(
        f"{path} could not be written ({error.strerror or error}): free some space or choose another folder"
    )
