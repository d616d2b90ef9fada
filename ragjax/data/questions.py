"""Passages and questions, and the reader of their JSON Lines files (.jsonl and .jsonl.gz).

Every line is checked; the first bad one ends the reading with a UserError that names file, line and mend.
Lines that hold only white space are skipped, keys that the schema does not name are ignored.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ragjax.errors import UserError


@dataclass(frozen=True, slots=True)
class Passage:
    """One passage of a corpus; the title may be empty."""

    id: str
    title: str
    text: str

    @property
    def embedder_text(self) -> str:
        """What the embedder reads: "title. text", or the text alone."""
        return f"{self.title}. {self.text}" if self.title else self.text

    @property
    def prompt_text(self) -> str:
        """What the generator reads: "title: text", or the text alone."""
        return f"{self.title}: {self.text}" if self.title else self.text


@dataclass(frozen=True, slots=True)
class Question:
    """One question. answers[0] is the training target; positive_ids is empty when unlabelled."""

    id: str
    question: str
    answers: tuple[str, ...]
    positive_ids: tuple[str, ...]


_Record = TypeVar("_Record", Passage, Question)


def read_corpus(path: str | Path) -> list[Passage]:
    """The passages of a corpus file {"id", "title", "text"}, in file order.

    "title" may be missing, null or empty. Raises UserError for an unreadable file, a bad line, an id that
    occurs twice, or a file without passages.
    """
    passages = _read_records(path, _passage)
    if not passages:
        raise UserError(f"{path} holds no passages: give it at least one line with id, title and text")
    return passages


def read_questions(path: str | Path, passage_ids: Collection[str] | None = None) -> list[Question]:
    """The questions of a split file {"id", "question", "answers", "positive_ids"}, in file order; [] for an
    empty file.

    passage_ids: the ids of the corpus, against which positive_ids are checked (None: not checked). A missing
    "positive_ids" reads as unlabelled, and a positive named twice counts once. Raises UserError for an
    unreadable file, a bad line, an id that occurs twice, or a positive that is not in the corpus.
    """
    return _read_records(path, lambda line: _question(line, passage_ids))


@dataclass(frozen=True, slots=True)
class _Line:
    """One parsed line, with what its error messages need."""

    path: str | Path
    number: int
    record: dict

    def error(self, fault: str, mend: str) -> UserError:
        return UserError(f"{self.path}, line {self.number}: {fault}; {mend}")

    def text(self, key: str) -> str:
        """The non-empty string under `key`."""
        if key not in self.record:
            raise self.error(f'"{key}" is missing', f'add "{key}": "..."')
        return self._checked(self.record[key], f'"{key}"')

    def texts(self, key: str) -> tuple[str, ...]:
        """The strings of the list under `key`, none of them empty; the list itself may be."""
        if key not in self.record:
            raise self.error(f'"{key}" is missing', f'add "{key}": ["..."]')
        value = self.record[key]
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


def _passage(line: _Line) -> Passage:
    return Passage(line.text("id"), line.optional_text("title"), line.text("text"))


def _question(line: _Line, passage_ids: Collection[str] | None) -> Question:
    identity, question, answers = line.text("id"), line.text("question"), line.texts("answers")
    if not answers:
        raise line.error('"answers" is empty', "give at least one accepted answer or remove the question")
    positives = line.texts("positive_ids") if "positive_ids" in line.record else ()
    for positive in positives:
        if passage_ids is not None and positive not in passage_ids:
            raise line.error(
                f'the positive id "{positive}" is not in the corpus',
                "add that passage to the corpus or remove the id",
            )
    return Question(identity, question, answers, tuple(dict.fromkeys(positives)))


def _read_records(path: str | Path, parse: Callable[[_Line], _Record]) -> list[_Record]:
    """Parsed records in file order; an id that occurs twice is an error."""
    records: list[_Record] = []
    first_seen: dict[str, int] = {}
    for line in _lines(path):
        record = parse(line)
        if record.id in first_seen:
            fault = f'the id "{record.id}" already stands on line {first_seen[record.id]}'
            raise line.error(fault, "give every line an id of its own")
        first_seen[record.id] = line.number
        records.append(record)
    return records


def _lines(path: str | Path) -> Iterator[_Line]:
    for number, data in _raw_lines(path):
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
        line = _Line(path, number, record)
        if not isinstance(record, dict):
            raise line.error(f"the line is {_kind(record)}", "write one JSON object {...} on each line")
        yield line


def _raw_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
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
    return kinds.get(type(value), "a number")
