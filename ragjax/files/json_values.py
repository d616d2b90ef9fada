"""JSON: whole files, and files with one value a line."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ragjax.errors import UserError, reason
from ragjax.files.plain import unreadable, write_atomic
from ragjax.settings import Settings

Parsed = TypeVar("Parsed")


def read_json(path: str | os.PathLike) -> Any:
    """The value that a JSON file holds. Raises UserError, naming the file, when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(Path(path), error) from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is not valid JSON ({error}): repair the file or create it again") from error


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """`read_json` of a file that must hold an object. Raises UserError, naming the file, for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object: repair the file or create it again")
    return value


def read_settings(path: str | os.PathLike) -> Settings:
    """`read_json_object` of another program's settings, which are read key by key; {} where there is no such file."""
    return Settings(read_json_object(path) if Path(path).is_file() else {}, path)


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
        raise unreadable(Path(path), error) from error
    except ValueError as error:
        raise UserError(
            f"{path} line {len(values) + 1} is not valid JSON ({error}): repair the file or create it again"
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
        raise unreadable(Path(path), error) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        fault = f"it lacks {error}" if isinstance(error, KeyError) else reason(error)
        raise UserError(f"{path} line {number} is damaged ({fault}): {mend}") from error


def write_json(path: str | os.PathLike, value: Any, everywhere: bool = False) -> None:
    """Writes `value` as indented UTF-8 JSON with a final newline, atomically.

    Raises UserError as `write_atomic` does, and ValueError for NaN or infinity, which JSON lacks: use None.
    """
    write_atomic(path, json_text(value), everywhere)


def json_text(value: Any) -> str:
    """A value as `write_json` writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
