"""Records as their files have them, one by one and checked; the reader of JSON Lines files (.jsonl and .jsonl.gz).

The first bad line ends the reading with a UserError that names file, line and mend. Lines that hold only white space
are skipped. null stands for a key that is missing.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from ragjax.errors import UserError


class _Identified(Protocol):
    @property
    def id(self) -> str: ...


_Record = TypeVar("_Record", bound=_Identified)


@dataclass(frozen=True, slots=True)
class Line:
    """One parsed line or row, with what its error messages need."""

    path: str | Path
    number: int
    record: dict
    unit: str = "line"

    @property
    def place(self) -> str:
        return f"{self.path}, {self.unit} {self.number}"

    def error(self, fault: str, mend: str) -> UserError:
        return UserError(f"{self.place}: {fault}; {mend}")

    def identity(self) -> str:
        """The string under "id", or "_id" as BEIR spells it."""
        return self.text("_id" if "_id" in self.record and "id" not in self.record else "id")

    def text(self, key: str) -> str:
        """The non-empty string under `key`."""
        if key not in self.record:
            raise self.error(f'"{key}" is missing', f'add "{key}": "..."')
        return self._checked(self.record[key], f'"{key}"')

    def identifier(self, *keys: str) -> str:
        """The id under the first of `keys` that is there: text, or a whole number as text."""
        key = next((key for key in keys if self.record.get(key) is not None), keys[0])
        value = self.record.get(key)
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else self.text(key)

    def inside(self, value: object, what: str) -> "Line":
        """An object that this record holds, `what` it is; its errors name the same place."""
        if not isinstance(value, dict):
            raise self.error(f"{what} is {_kind(value)}", "write an object {...}")
        return Line(self.path, self.number, value, self.unit)

    def optional_texts(self, key: str) -> tuple[str, ...]:
        """The strings of the list under `key`, none of them empty; () if it is missing or null."""
        value = self.record.get(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.error(f'"{key}" is {_kind(value)}', f'write a list of strings, "{key}": ["..."]')
        return tuple(self._checked(item, f'entry {i} of "{key}"') for i, item in enumerate(value, start=1))

    def _checked(self, value: object, what: str) -> str:
        if not isinstance(value, str):
            raise self.error(f"{what} is {_kind(value)}", "write a string in double quotes")
        if not value.strip():
            raise self.error(f"{what} is empty", "fill it in or remove the entry")
        try:  # JSON can spell half of a surrogate pair, which neither UTF-8 nor a tokenizer can take
            value.encode()
        except UnicodeEncodeError:
            raise self.error(f"{what} holds half of a surrogate pair", "write the whole character") from None
        return value

    def optional_text(self, key: str) -> str:
        """The string under `key`; "" if it is missing, null or white space."""
        value = self.record.get(key)
        if value is None or (isinstance(value, str) and not value.strip()):
            return ""
        return self._checked(value, f'"{key}"')


def read_records(path: str | Path, parse: Callable[[Line], _Record]) -> list[_Record]:
    """Parsed records in file order; an id that occurs twice is an error."""
    records: list[_Record] = []
    first_seen: dict[str, int] = {}
    for line in read_lines(path):
        record = parse(line)
        if record.id in first_seen:
            fault = f'the id "{record.id}" already stands on line {first_seen[record.id]}'
            raise line.error(fault, "give every line an id of its own")
        first_seen[record.id] = line.number
        records.append(record)
    return records


def read_lines(path: str | Path) -> Iterator[Line]:
    """The objects of a JSON Lines file, in file order."""
    for number, data in raw_lines(path):
        try:
            # A byte order mark (some editors write one) is allowed at the start of the file only.
            text = data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            fault = f"byte {error.start + 1} is not valid UTF-8"
            raise UserError(f"{path}, line {number}: {fault}; save the file in UTF-8") from None
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            fault = f"not valid JSON ({getattr(error, 'msg', None) or error})"
            raise UserError(f"{path}, line {number}: {fault}; write one JSON object on each line") from None
        line = Line(path, number, record)
        if not isinstance(record, dict):
            raise line.error(f"the line is {_kind(record)}", "write one JSON object {...} on each line")
        yield line


def raw_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes); lines end at "\\n" alone, so U+2028 inside a text does not split it."""
    number = 0
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            for number, data in enumerate(file, start=1):
                yield number, data
    except EOFError:
        raise UserError(f"{path} is cut off after line {number}: fetch or compress the file again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        mend = "fetch or compress it again, or drop .gz from its name if it is plain text"
        raise UserError(f"{path} is not an intact gzip file after line {number} ({error}): {mend}") from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): check the path and its permissions"
        ) from None


def _kind(value: object) -> str:
    """A JSON value's kind, with its article."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value)) or (
        "a number" if isinstance(value, int | float) else f"of type {type(value).__name__}"
    )
