"""Records under named columns, whatever kind of file they stand in; each is read one after another.

.jsonl, .jsonl.gz      one object a line
.json, .json.gz        a list of objects, or one object a line (what `datasets` writes)
.parquet               batch by batch
.csv, .tsv, with .gz   under a header; a list is JSON text in its cell
"""

import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ragjax.data.lines import Line, read_lines
from ragjax.errors import UserError, reason

ENDINGS = tuple(f".{kind}{packed}" for kind in ("jsonl", "json", "csv", "tsv") for packed in ("", ".gz")) + (
    ".parquet",
)
# The hub and `datasets` cut a table into such files: train-00000-of-00002.parquet.
_SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]{16})?$")
_ROWS_AT_ONCE = 512
_CHARACTERS_AT_ONCE = 1 << 20
_LONGEST_RECORD = 1 << 28
# Columns whose cells hold a list.
_LISTS = ("answers", "positive_ids", "golden_answers", "possible_answers")
_BETWEEN = re.compile(r"[ \t\r\n,]+")


@dataclass(frozen=True)
class Table:
    """where: what messages call it. read: its records, anew at each call."""

    where: str
    find_columns: Callable[[], Sequence[str]]
    read: Callable[[], Iterator[Line]]
    files: tuple[Path, ...] = ()

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """Their names; of JSON, the keys of the first record. () for a file without records."""
        return tuple(self.find_columns())

    def has(self, *columns: str) -> bool:
        return all(column in self.columns for column in columns)

    def no_columns(self, what: str, needed: str) -> UserError:
        """What to raise where it does not have the columns that are needed."""
        if not self.columns:
            return UserError(f"{self.where} has no {what}, because it is empty: write them, or remove the file")
        there = ", ".join(self.columns)
        if len(self.columns) == 1 and (separator := next((c for c in ";\t|" if c in there), None)):
            return UserError(f"{self.where} separates its columns by {separator!r}: separate them by commas")
        return UserError(f"{self.where} has no {what}: it needs {needed}, and its columns are {there}; rename them")


def stem_of(path: Path) -> str:
    """A file's name without its ending and its number among several; "" for files that are no tables."""
    ending = next((ending for ending in sorted(ENDINGS, key=len, reverse=True) if path.name.endswith(ending)), None)
    return _SHARD.sub("", path.name.removesuffix(ending)) if ending else ""


def tables_in(folder: Path) -> dict[str, Table]:
    """The tables of a folder by the stem of their files, in the order of their names.

    Raises UserError where two files that are not parts of one table have the same stem.
    """
    by_stem: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and (stem := stem_of(path)):
            by_stem.setdefault(stem, []).append(path)
    return {stem: _joined(stem, folder, paths) for stem, paths in by_stem.items()}


def open_table(path: Path) -> Table:
    """The records of one file."""
    if path.suffix == ".parquet":
        return Table(str(path), functools.partial(_parquet_columns, path), lambda: _parquet_rows(path), (path,))
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    reader = {"jsonl": read_lines, "json": _json_records, "csv": _cells, "tsv": _cells}[kind]
    columns = _header if kind in ("csv", "tsv") else _first_keys
    return Table(str(path), lambda: columns(path), lambda: reader(path), (path,))


def chain(where: str, tables: Sequence[Table]) -> Table:
    """Several tables with the same columns, one after another."""
    if len(tables) == 1:
        return tables[0]
    return Table(
        where,
        lambda: tables[0].columns,
        lambda: itertools.chain.from_iterable(table.read() for table in tables),
        tuple(path for table in tables for path in table.files),
    )


def _joined(stem: str, folder: Path, paths: list[Path]) -> Table:
    if len(paths) > 1 and any(not _SHARD.search(path.name.partition(".")[0]) for path in paths):
        whole = sorted(paths, key=lambda path: bool(_SHARD.search(path.name.partition(".")[0])))
        raise UserError(f"{folder} has both {whole[0].name} and {whole[1].name}: remove the one that is out of date")
    return chain(str(folder / stem), [open_table(path) for path in paths])


def _first_keys(path: Path) -> list[str]:
    first = next(open_table(path).read(), None)
    return list(first.record) if first else []


def _parquet_columns(path: Path) -> list[str]:
    return _parquet(path).schema_arrow.names


def _parquet_rows(path: Path) -> Iterator[Line]:
    number = 0
    file = _parquet(path)
    try:
        for batch in file.iter_batches(_ROWS_AT_ONCE):
            for record in batch.to_pylist():
                number += 1
                yield Line(path, number, record, "row")
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        raise _damaged(path, error) from error
    finally:
        file.close()


def _parquet(path: Path):
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read ({reason(error)}): fetch or write it again")


def _text(path: Path) -> IO[str]:
    """The file's text; white space stays as it is."""
    file = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")  # noqa: SIM115  the caller closes it
    return io.TextIOWrapper(file, "utf-8-sig", newline="")


def _header(path: Path) -> list[str]:
    try:
        with _text(path) as file:
            return next(csv.reader(file, delimiter=_delimiter(path)), [])
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        raise _damaged(path, error) from error


def _delimiter(path: Path) -> str:
    return "\t" if ".tsv" in path.suffixes else ","


def _cells(path: Path) -> Iterator[Line]:
    """The rows of a file with a header; a cell that is empty counts as missing, one with a JSON list as that list."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    number = 0
    try:
        with _text(path) as file:
            # Strict: a quote that is never closed would make one cell of all that follows.
            rows = csv.DictReader(file, delimiter=_delimiter(path), strict=True)
            names = rows.fieldnames or []
            if repeated := next((name for name in names if names.count(name) > 1), None):
                raise UserError(f'{path} has two columns "{repeated}": rename or remove one')
            for cells in rows:
                number += 1
                line = Line(path, number, {}, "row")
                if None in cells or None in cells.values():
                    raise line.error("it has more or fewer cells than the header", "quote cells that hold separators")
                line.record.update((name, _listed(name, cell)) for name, cell in cells.items() if cell)
                yield line
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        raise UserError(
            f"{path} cannot be read after row {number} ({reason(error)}): save it as UTF-8 text, and quote cells that "
            "hold separators"
        ) from error


def _listed(name: str, cell: str) -> str | list:
    """A cell's text, or what it spells in JSON, where its column is one of lists."""
    if name in _LISTS:
        with contextlib.suppress(ValueError):
            return json.loads(cell)
    return cell


def _json_records(path: Path) -> Iterator[Line]:
    """The objects of a list, or of lines, without holding more than one of them."""
    try:
        with _text(path) as file:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            if first == "[":
                yield from _listed_objects(path, file)
                return
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise _damaged(path, error) from error
    yield from read_lines(path)


def _listed_objects(path: Path, file: IO[str]) -> Iterator[Line]:
    """The objects of a JSON list whose bracket has been read."""
    decoder, text, place, number, is_at_end = json.JSONDecoder(), "", 0, 0, False
    while True:
        between = _BETWEEN.match(text, place)
        place = between.end() if between else place
        if text.startswith("]", place):
            return
        try:
            record, end = decoder.raw_decode(text, place)
        except ValueError:
            rest = text[place:]
            if is_at_end or len(rest) > _LONGEST_RECORD:
                fault = f"{path} is not a whole JSON list: after entry {number} no object follows"
                raise UserError(f"{fault}; fetch or write it again") from None
            # As much again as there is: a long record is not parsed many times over.
            more = file.read(max(_CHARACTERS_AT_ONCE, len(rest)))
            text, place, is_at_end = rest + more, 0, not more
            continue
        number += 1
        line = Line(path, number, record, "entry")
        if not isinstance(record, dict):
            raise line.error("it is no object", "write a list of objects {...}")
        yield line
        place = end
