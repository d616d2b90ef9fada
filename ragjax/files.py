"""Small file helpers of the whole house: atomic writes, JSON, and the hash of a file."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ragjax.errors import UserError


def write_atomic(path: str | os.PathLike, content: bytes | str) -> None:
    """Writes `content` (str as UTF-8) to `path`; readers see the old file or the whole new one, never a part.

    The parent folder is made when missing. Raises UserError when the file cannot be written (a full disk, no
    permission); the old file, if any, then stands unchanged and nothing is left beside it.
    """
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
        raise UserError(
            f"{path} could not be read ({error.strerror or error}): check its name and permissions"
        ) from error


def read_json(path: str | os.PathLike) -> Any:
    """The value that a JSON file holds. Raises UserError, naming the file, when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} could not be read ({error.strerror or error}): check its name and permissions"
        ) from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is not valid JSON ({error}): repair the file or make it anew") from error


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """`read_json` of a file that must hold an object. Raises UserError, naming the file, for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object: repair the file or make it anew")
    return value


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON with a final newline, atomically.

    Raises UserError as `write_atomic` does, and ValueError for NaN or infinity, which JSON lacks: use None.
    """
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} could not be written ({error.strerror or error}): free some space or choose another folder"
    )
