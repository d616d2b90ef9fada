"""The layout of a prepared folder.

FOLDER/corpus/              the passages, memory-mapped (ragjax/data/arrow.py)
FOLDER/train.jsonl, ...     the questions, as in ragjax's own layout; no file for a split without questions
FOLDER/provenance.json      what they were made of, and what was left out
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ragjax.data.arrow import RECORD as STORE_RECORD
from ragjax.data.arrow import ArrowStore
from ragjax.data.lines import Line
from ragjax.data.questions import Question, read_questions
from ragjax.data.sources.assembly import assemble
from ragjax.data.sources.source import SPLITS, Facts, Source
from ragjax.data.sources.tables import Table, open_table
from ragjax.errors import UserError
from ragjax.files import read_json_object
from ragjax.files.plain import unwritable

LAYOUT = 1
_CORPUS, _PROVENANCE = "corpus", "provenance.json"


class Prepared(NamedTuple):
    """A prepared folder, opened."""

    passages: ArrowStore
    questions: dict[str, list[Question]]  # by split; [] where there are none
    provenance: dict[str, Any]


def corpus_of(folder: Path) -> Path:
    return folder / _CORPUS


def questions_of(folder: Path, split: str) -> Path:
    return folder / f"{split}.jsonl"


def provenance_of(folder: Path) -> Path:
    return folder / _PROVENANCE


def is_prepared(folder: Path) -> bool:
    return provenance_of(folder).is_file() and corpus_of(folder).is_dir()


def open_prepared(folder: Path) -> Prepared:
    """What a prepared folder holds. Raises UserError where a file of it is missing, damaged or of another version."""
    provenance = read_json_object(provenance_of(folder))
    if provenance.get("layout") != LAYOUT:
        raise UserError(f"{folder} was prepared by another version of ragjax: prepare the data again")
    passages = ArrowStore(corpus_of(folder))
    questions = {
        split: read_questions(path, passages) if (path := questions_of(folder, split)).is_file() else []
        for split in SPLITS
    }
    return Prepared(passages, questions, provenance)


def open_prepared_source(folder: Path) -> Source:
    """A prepared folder as a source, to be cut otherwise or to lend its passages to other questions."""
    stated = read_json_object(provenance_of(folder)).get("source") or {}
    where = corpus_of(folder)

    def read() -> Iterator[Line]:
        for number, passage in enumerate(ArrowStore(where), start=1):
            record = {"id": passage.id, "title": passage.title, "text": passage.text}
            yield Line(where, number, record, "passage")

    corpus = Table(str(where), lambda: ("id", "title", "text"), read, (where / STORE_RECORD,))
    tables = {split: open_table(path) for split in SPLITS if (path := questions_of(folder, split)).is_file()}
    facts = Facts(stated.get("revision"), stated.get("licence"))
    return assemble(folder.resolve().name, tables, corpus, folder=folder, facts=lambda: facts)


def write_questions(path: Path, questions: Iterable[Question]) -> int:
    """Writes a split, if it has questions, and says how many. Raises UserError when it cannot be written."""
    count = 0
    try:
        with open(path, "wb") as file:
            for each in questions:
                record = {"id": each.id, "question": each.question, "answers": each.answers}
                line = json.dumps(record | {"positive_ids": each.positive_ids}, ensure_ascii=False)
                file.write(f"{line}\n".encode())
                count += 1
            file.flush()
            os.fsync(file.fileno())
        if not count:
            path.unlink()
    except OSError as error:
        raise unwritable(path, error) from error
    return count
