"""Data sets by name or folder: a corpus and up to three splits of questions."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ragjax.data.beir import read_qrels, read_queries
from ragjax.data.passages import PassageList, PassageStore, RecordsHash
from ragjax.data.questions import Question, check_answers, read_corpus, read_questions
from ragjax.errors import UserError
from ragjax.paths import expanded

SAMPLE_FOLDER = Path(__file__).parent / "sample"
# The split's own name, and those that other libraries give its file.
SPLITS = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
# Names that belong to data sets of their own and are not shipped.
_NOT_BUILT_IN = ("hotpotqa", "popqa")


@dataclass(frozen=True)
class Dataset:
    """One corpus with its questions.

    passages [P] stand in file order: a passage's row in the store is its row in the index. A split that the
    folder does not have is []. sha256 is a hash of all records, the same for .jsonl and .jsonl.gz. note is what a
    reader may not expect, in words. files: by split, where its questions stand.
    """

    name: str
    folder: Path
    passages: PassageStore
    train: list[Question]
    dev: list[Question]
    test: list[Question]
    sha256: str
    note: str = ""
    files: Mapping[str, Path] = field(default_factory=dict)

    def repeated(self) -> Iterator[tuple[str, str, list[Question]]]:
        """(a split, an earlier one, the questions of the former that stand in the latter) where there are any.

        Ids are unique within a file alone, and one text may ask about many things: a question is the same where text
        and id are, or text and answers.
        """
        for earlier, split in itertools.combinations(SPLITS, 2):
            known = {mark for question in getattr(self, earlier) for mark in _marks(question)}
            if found := [question for question in getattr(self, split) if known & _marks(question)]:
                yield split, earlier, found

    def split_file(self, split: str) -> str:
        """What a missing split would stand in, in the folder's own layout."""
        return f"qrels/{split}.tsv" if (self.folder / "qrels").is_dir() else f"{split}.jsonl"

    def check_answers(self, split: str, questions: Iterable[Question], flag: str) -> None:
        """`ragjax.data.questions.check_answers` of questions of a split, whose file it names."""
        check_answers(questions, self.files.get(split, self.folder), flag)


def load_dataset(name_or_dir: str | Path) -> Dataset:
    """The data set of a local folder, or the built-in "sample"; a local folder of that name comes first.

    The folder holds corpus and train, dev (or validation, valid, val) or test, each as .jsonl or .jsonl.gz; or it has
    BEIR's layout (`ragjax.data.beir`). Other files in it are ignored. Raises UserError for an unknown name, a folder
    without a corpus or without any split, two files for one split, and for every bad line.
    """
    name, folder = _locate(name_or_dir)
    corpus_file = _data_file(folder, ("corpus",))
    if corpus_file is None:
        raise UserError(f"{folder} has no corpus.jsonl or corpus.jsonl.gz: pass the folder that holds the passages")
    split_files = {split: _data_file(folder, stems) for split, stems in SPLITS.items()}
    judged = {split: _data_file(folder / "qrels", stems, (".tsv",)) for split, stems in SPLITS.items()}
    queries_file = _data_file(folder, ("queries",)) if any(judged.values()) else None
    if not any((*split_files.values(), queries_file)):
        raise UserError(
            f"{folder} has no questions: add a train, dev or test file (.jsonl or .jsonl.gz), or queries.jsonl and "
            "qrels/ in BEIR's layout"
        )
    if queries_file and (splits_file := next(filter(None, split_files.values()), None)):
        raise UserError(
            f"{folder} has both {splits_file.name} and {queries_file.name} with qrels/: leave one of the two layouts"
        )
    passages = PassageList(read_corpus(corpus_file))
    if queries_file:
        queries = read_queries(queries_file)
        splits = {split: read_qrels(path, queries, passages) if path else [] for split, path in judged.items()}
        notes = ["BEIR's layout, without answers"]
        files = dict.fromkeys(SPLITS, queries_file)
    else:
        splits = {split: read_questions(path, passages) if path else [] for split, path in split_files.items()}
        unanswered = sum(not question.answers for questions in splits.values() for question in questions)
        notes = [f"{unanswered:,} of them without answers"] if unanswered else []
        files = {split: path for split, path in split_files.items() if path}
    dev_file = judged["dev"] if queries_file else split_files["dev"]
    if dev_file and not dev_file.name.startswith("dev."):
        notes.append(f"dev from {dev_file.name}")
    return Dataset(
        name, folder, passages, **splits, sha256=_hash_all(passages, splits), note="; ".join(notes), files=files
    )


def _marks(question: Question) -> set[tuple[str, str | frozenset[str]]]:
    """What tells a question from others that are worded alike."""
    marks: set[tuple[str, str | frozenset[str]]] = {(question.question, question.id)}
    return marks | ({(question.question, frozenset(question.answers))} if question.answers else set())


def _locate(name_or_dir: str | Path) -> tuple[str, Path]:
    """(name, existing folder)."""
    name = str(name_or_dir)
    folder = Path(expanded(name))
    if name and os.path.isdir(folder):
        return folder.resolve().name, folder
    if name == "sample":
        return name, SAMPLE_FOLDER
    if name in _NOT_BUILT_IN:
        raise UserError(f'the data set "{name}" is not built in yet: pass the folder that holds it, --data=FOLDER')
    if name and os.path.exists(folder):
        raise UserError(f"{name} is a file, not a data folder: pass the folder that holds corpus.jsonl and its splits")
    raise UserError(f'there is no data folder "{name}": pass an existing folder, or --data=sample for the built-in one')


def _data_file(folder: Path, stems: Sequence[str], endings: Sequence[str] = (".jsonl", ".jsonl.gz")) -> Path | None:
    """The folder's file of one of these stems, packed or plain; None if it has none. Raises UserError for several."""
    found = [path for stem in stems for ending in endings if (path := folder / f"{stem}{ending}").exists()]
    if len(found) > 1:
        raise UserError(f"{folder} has both {found[0].name} and {found[1].name}: remove the one that is out of date")
    return found[0] if found else None


def _hash_all(passages: PassageStore, splits: Mapping[str, Sequence[Question]]) -> str:
    """sha256 over all records; that over the passages is the store's own, which may stand beside it already."""
    digest = RecordsHash()
    digest.add("corpus", passages.records_hash)
    for split, questions in splits.items():
        digest.add(split, len(questions))
        for question in questions:
            digest.add(question.id, question.question, question.answers, question.positive_ids)
    return digest.hexdigest()
