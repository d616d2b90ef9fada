"""Lists of numbers by key, kept in a file."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ragjax.errors import UserError
from ragjax.files.plain import append_line, write_atomic


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
            raise UserError(f"{self._path} is damaged ({error}): delete it, and it will be created again") from error
        if len(kept) < len(found):
            write_atomic(self._path, "".join(kept))
        self.lines = len(kept)
