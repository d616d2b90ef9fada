"""Data sets by name or folder: a corpus and up to three splits of questions."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from ragjax.data.questions import Passage, Question, read_corpus, read_questions
from ragjax.errors import UserError

SAMPLE_FOLDER = Path(__file__).parent / "sample"
SPLITS = ("train", "dev", "test")
# Names that belong to data sets of their own and are not shipped.
_NOT_BUILT_IN = ("hotpotqa", "popqa")


@dataclass(frozen=True)
class Dataset:
    """One corpus with its questions.

    passages [P] stand in file order: a passage's row number in the index is its place here. A split that the
    folder does not have is []. sha256 is a hash of all records, the same for .jsonl and .jsonl.gz.
    """

    name: str
    folder: Path
    passages: list[Passage]
    train: list[Question]
    dev: list[Question]
    test: list[Question]
    sha256: str


def load_dataset(name_or_dir: str | Path) -> Dataset:
    """The data set of a local folder, or the built-in "sample"; a local folder of that name comes first.

    The folder holds corpus and train, dev or test, each as .jsonl or .jsonl.gz; other files in it are
    ignored. Raises UserError for an unknown name, a folder without a corpus or without any split, and for
    every bad line.
    """
    name, folder = _locate(name_or_dir)
    corpus_file = _data_file(folder, "corpus")
    if corpus_file is None:
        raise UserError(f"{folder} has no corpus.jsonl or corpus.jsonl.gz: pass the folder that holds the passages")
    split_files = {split: _data_file(folder, split) for split in SPLITS}
    if not any(split_files.values()):
        raise UserError(f"{folder} has no questions: add a train, dev or test file (.jsonl or .jsonl.gz)")
    passages = read_corpus(corpus_file)
    ids = {passage.id for passage in passages}
    splits = {split: read_questions(path, ids) if path else [] for split, path in split_files.items()}
    return Dataset(name, folder, passages, **splits, sha256=_content_hash({"corpus": passages, **splits}))


def _locate(name_or_dir: str | Path) -> tuple[str, Path]:
    """(name, existing folder)."""
    name = str(name_or_dir)
    folder = Path(os.path.expanduser(name))  # a shell leaves the ~ of --data=~/folder alone
    if name and os.path.isdir(folder):
        return folder.resolve().name, folder
    if name == "sample":
        return name, SAMPLE_FOLDER
    if name in _NOT_BUILT_IN:
        raise UserError(f'the data set "{name}" is not built in yet: pass the folder that holds it, --data=FOLDER')
    if name and os.path.exists(folder):
        raise UserError(f"{name} is a file, not a data folder: pass the folder that holds corpus.jsonl and its splits")
    raise UserError(f'there is no data folder "{name}": pass an existing folder, or --data=sample for the built-in one')


def _data_file(folder: Path, stem: str) -> Path | None:
    """The folder's file of that stem, packed or plain; None if it has neither."""
    found = [path for path in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz") if path.exists()]
    if len(found) > 1:
        raise UserError(f"{folder} has both {found[0].name} and {found[1].name}: remove the one that is out of date")
    return found[0] if found else None


def _content_hash(sections: dict[str, Iterable[Passage | Question]]) -> str:
    """sha256 over the parsed records, in order, so that packing, spacing and unknown keys do not count."""
    digest = hashlib.sha256()
    for section, records in sections.items():
        digest.update(f"{section}\n".encode())  # cannot be taken for a record, which starts with "["
        for record in records:
            values = [getattr(record, field.name) for field in fields(record)]
            digest.update(json.dumps(values).encode() + b"\n")
    return digest.hexdigest()
