"""Data sets by name or folder: a corpus and up to three splits of questions.

ragjax's own JSON Lines are read as they are, and prepared folders are opened. Everything else is prepared into the
cache first, once for the same files:

    cache/data/<key>/       a prepared folder; the key is made of the source's description and its files' names, sizes
                            and times
    cache/data/<key>.lock   held by the one process that prepares it
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ragjax.data.lines import read_lines
from ragjax.data.passages import PassageList, PassageStore, RecordsHash
from ragjax.data.preparing import lost_labels, prepare, without_passages
from ragjax.data.questions import Question, check_answers, read_corpus, read_questions
from ragjax.data.sources import SPLITS, Source
from ragjax.data.sources.assembly import is_foreign
from ragjax.data.sources.folders import open_folder
from ragjax.data.sources.opening import SAMPLE_FOLDER, find_folder, open_named
from ragjax.data.sources.prepared import LAYOUT, Prepared, is_prepared, open_prepared
from ragjax.data.sources.source import SPLIT_NAMES
from ragjax.errors import UserError
from ragjax.files import caching, default_cache_dir, lock_file
from ragjax.voice import say, warn


@dataclass(frozen=True)
class Dataset:
    """One corpus with its questions.

    passages [P] stand in file order: a passage's row in the store is its row in the index. A split that the
    folder does not have is []. sha256 is a hash of all records, the same for .jsonl and .jsonl.gz. note is what a
    reader may not expect, in words. files: by split, where its questions stand. missing: what a split that is not
    there would stand in.
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
    missing: str = "{split}.jsonl"

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
        return self.missing.format(split=split)

    def check_answers(self, split: str, questions: Iterable[Question], flag: str) -> None:
        """`ragjax.data.questions.check_answers` of questions of a split, whose file it names."""
        check_answers(questions, self.files.get(split, self.folder), flag)


def load_dataset(name_or_dir: str | Path) -> Dataset:
    """The data set of a local folder, or a named one; a local folder of that name comes first.

    The folder holds corpus and train, dev (or validation, valid, val) or test, each as .jsonl or .jsonl.gz, or is one
    that `ragjax.prepare` wrote, or has another layout of `ragjax.data.sources`, which is then prepared into the cache.
    Other files in it are ignored. Raises UserError for an unknown name, a folder without a corpus or without any split,
    two files for one split, and for every bad line.
    """
    name = str(name_or_dir)
    folder = find_folder(name)
    if folder is None:
        return _through_cache(open_named(name))
    if is_prepared(folder):
        return _from_prepared(folder)
    if plain := _plain_files(folder):
        called = name if folder == SAMPLE_FOLDER else folder.resolve().name
        return _read_plain(called, folder, *plain)
    source = open_folder(folder)
    if source is None or (source.is_own and source.passages is None):
        raise UserError(f"{folder} has no corpus.jsonl or corpus.jsonl.gz: pass the folder that holds the passages")
    return _through_cache(source)


def _plain_files(folder: Path) -> tuple[Path, dict[str, Path]] | None:
    """(the corpus, the questions by split) where a folder has ragjax's own JSON Lines and nothing else."""
    corpus = _data_file(folder, ("corpus",))
    names = {split: [name for name, ours in SPLIT_NAMES.items() if ours == split] for split in SPLITS}
    found = {split: path for split in SPLITS if (path := _data_file(folder, names[split]))}
    others = [folder / f"{name}{ending}" for name in SPLIT_NAMES for ending in (".json", ".parquet", ".csv", ".tsv")]
    if corpus is None or (folder / "qrels").is_dir() or any(path.exists() for path in others):
        return None
    if any(is_foreign(_first_keys(path)) for path in (corpus, *found.values())):
        return None
    return corpus, found


def _first_keys(path: Path) -> list[str]:
    try:
        return list(next(read_lines(path)).record)
    except (StopIteration, UserError):  # what is wrong is said by whoever reads it
        return []


def _read_plain(name: str, folder: Path, corpus: Path, files: dict[str, Path]) -> Dataset:
    if not files:
        raise _no_questions(folder)
    passages = PassageList(read_corpus(corpus))
    splits = {split: read_questions(files[split], passages) if split in files else [] for split in SPLITS}
    notes = _unanswered(splits)
    if "dev" in files and not files["dev"].name.startswith("dev."):
        notes.append(f"dev from {files['dev'].name}")
    return _dataset(name, folder, passages, splits, notes, files)


def _from_prepared(folder: Path) -> Dataset:
    """A folder that `ragjax.prepare` wrote."""
    found = open_prepared(folder)
    if not any(found.questions.values()):
        raise _no_questions(folder)
    notes = [f"prepared from {found.provenance['source']['name']}", *_unanswered(found.questions)]
    notes += lost_labels(found.provenance)
    files = {split: folder / f"{split}.jsonl" for split, questions in found.questions.items() if questions}
    return _dataset(folder.resolve().name, folder, found.passages, found.questions, notes, files)


def _through_cache(source: Source) -> Dataset:
    """A source from its prepared copy in the cache, which is made now if there is none."""
    where = source.folder or Path(source.name)
    if source.passages is None:
        raise without_passages(source)
    if not source.splits:
        raise _no_questions(where)
    folder = default_cache_dir() / "data" / _key(source)
    found = _open_cached(folder)
    if found is None:
        with caching("the prepared data", folder):
            lock = lock_file(folder.with_name(f"{folder.name}.lock"), f"another process is preparing {where}: waiting")
        with lock:
            found = _open_cached(folder)  # another process may have prepared it meanwhile
            if found is None:
                say(f"{source.describe()} is prepared into {folder}", flush=True)
                shutil.rmtree(folder, ignore_errors=True)
                prepare(source, folder)
                found = open_prepared(folder)
    # Of ragjax's own columns there is nothing to say.
    layout = [] if source.is_own else [source.layout]
    notes = [*filter(None, [", ".join([*layout, *_unanswered(found.questions)])]), *lost_labels(found.provenance)]
    notes += source.notes
    files = {split: Path(part.where) for split, part in source.splits.items()}
    return _dataset(source.name, where, found.passages, found.questions, notes, files, source.missing)


def _open_cached(folder: Path) -> Prepared | None:
    """The prepared copy; None where there is none, or it is damaged, which is warned of."""
    if not is_prepared(folder):
        return None
    try:
        return open_prepared(folder)
    except UserError as error:
        warn(f"{error}; it is prepared anew")
        return None


def _key(source: Source) -> str:
    """The name of a source's prepared copy. A set of the hub has the same whatever its revision: a copy stays as it is
    until it is removed.
    """
    status = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    identity = [LAYOUT, source.name, source.layout, source.notes, list(source.splits), status]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _dataset(
    name: str,
    folder: Path,
    passages: PassageStore,
    splits: Mapping[str, list[Question]],
    notes: Sequence[str],
    files: Mapping[str, Path],
    missing: str = "{split}.jsonl",
) -> Dataset:
    digest = _hash_all(passages, splits)
    return Dataset(name, folder, passages, **splits, sha256=digest, note="; ".join(notes), files=files, missing=missing)


def _unanswered(splits: Mapping[str, Sequence[Question]]) -> list[str]:
    """In words how many questions have no answers, if any."""
    every = [question for questions in splits.values() for question in questions]
    count = sum(not question.answers for question in every)
    return [] if not count else ["without answers"] if count == len(every) else [f"{count:,} of them without answers"]


def _no_questions(where: Path) -> UserError:
    return UserError(
        f"{where} has no questions: add a train, dev or test file (.jsonl or .jsonl.gz), or queries.jsonl and qrels/ "
        "in BEIR's layout"
    )


def _marks(question: Question) -> set[tuple[str, str | frozenset[str]]]:
    """What tells a question from others that are worded alike."""
    marks: set[tuple[str, str | frozenset[str]]] = {(question.question, question.id)}
    return marks | ({(question.question, frozenset(question.answers))} if question.answers else set())


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
