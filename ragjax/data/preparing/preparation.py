"""From a source to a prepared folder: passages stream into the store, and questions get their positives.

The questions are read first, since their labels say what to look for while the corpus goes by. The folder appears by
one rename. A killed preparation begins anew: it would have to read the source up to the same place in any case.
"""

import importlib.metadata
import platform
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragjax.data.arrow import ArrowStore, ArrowWriter
from ragjax.data.chunking import Chunker
from ragjax.data.preparing.labels import LOST, NAMED, RULE, UNLABELLED, Matcher, titles_of
from ragjax.data.questions import Passage
from ragjax.data.sources import SPLITS, Asked, Source, Tally
from ragjax.data.sources.prepared import LAYOUT, corpus_of, provenance_of, questions_of, write_questions
from ragjax.errors import UserError
from ragjax.files import new_folder, write_json
from ragjax.version import __version__
from ragjax.voice import progress

_CHECKED_EVERY = 1 << 13  # documents between two looks at the disk
_SPARE = 1 << 24  # bytes: the batch that is still in memory, and questions
_BY_PASSAGE = 32  # bytes of the tables of ids, which are written at the end
NO_CHUNKS = "documents without text"


@dataclass(frozen=True)
class Cutting:
    """How documents become passages. described: in words and numbers, for the provenance."""

    cut: Chunker
    described: Mapping[str, Any]


def prepare(
    source: Source, out: str | Path, corpus: Source | None = None, cutting: Cutting | None = None, shown: bool = True
) -> dict[str, Any]:
    """Writes a prepared folder, and says what is in it and what was left out: its provenance.

    Args:
      source: of the questions, and of the passages where `corpus` is None.
      out: the folder, which must not exist yet.
      corpus: where the passages come from instead.
      cutting: of documents into passages; None: they are passages.
      shown: draw progress.

    Raises:
      UserError: bad data, a source without passages, `out` exists, no room, or another process writes it; then `out`
        does not exist.
    """
    passages_from = corpus or source
    if passages_from.passages is None:
        raise without_passages(passages_from)
    dropped: Tally = Counter()
    with new_folder(out) as part:
        origins = {"source": _described(source), "corpus": _described(corpus) if corpus else None}
        asked = {split: list(source.splits[split].questions(dropped)) for split in SPLITS if split in source.splits}
        matcher = _matcher(asked, source, corpus, cutting)
        store, read = _write_corpus(part, Path(out), passages_from, matcher, cutting, dropped, shown)
        counts = {split: write_questions(questions_of(part, split), matcher.questions(split, store)) for split in asked}
        record = {
            "layout": LAYOUT,
            **origins,
            "chunking": dict(cutting.described) if cutting else None,
            "documents": read,
            "passages": len(store),
            "questions": counts,
            "dropped": dict(sorted(dropped.items())),
            "labels": {"rule": RULE, **dict(sorted(matcher.counts.items()))},
            "versions": _versions(),
        }
        write_json(provenance_of(part), record, everywhere=True)
    return record


def summary_of(record: Mapping[str, Any]) -> Iterator[str]:
    """What a provenance says, line by line."""
    questions = " / ".join(f"{record['questions'].get(split, 0):,}" for split in SPLITS)
    yield f"{record['passages']:,} passages, {questions} questions (train / dev / test)"
    for reason, count in record["dropped"].items():
        yield f"left out: {count:,} {reason}"
    labels = {outcome: count for outcome, count in record["labels"].items() if outcome != "rule"}
    for outcome, count in labels.items():
        yield f"{outcome}: {count:,}"
    if not labels.keys() <= {NAMED, UNLABELLED}:
        yield f"the rule: {record['labels']['rule']}"


def lost_labels(record: Mapping[str, Any]) -> list[str]:
    """In words how many labels of a provenance have no passage, if any."""
    counts = {outcome: count for outcome, count in record["labels"].items() if outcome not in ("rule", UNLABELLED)}
    lost = sum(counts.get(outcome, 0) for outcome in LOST)
    return [f"{lost:,} of {sum(counts.values()):,} labels without a passage"] if lost else []


def without_passages(source: Source) -> UserError:
    """What to raise where passages are needed and a source has none."""
    named = shlex.quote(str(source.folder or source.name))
    return UserError(
        f"{source.describe()} has no passages of its own: say where they come from, python -m ragjax.prepare "
        f"--source={named} --corpus=FOLDER --out=FOLDER"
    )


def _matcher(
    asked: Mapping[str, list[Asked]], source: Source, corpus: Source | None, cutting: Cutting | None
) -> Matcher:
    titles: dict[str, str] = {}
    if corpus is not None and (passages := source.passages) is not None:
        titles = titles_of(asked, lambda: passages(Counter()))
    return Matcher(asked, is_own=corpus is None, is_whole=cutting is None, titles=titles)


def _write_corpus(
    part: Path, out: Path, source: Source, matcher: Matcher, cutting: Cutting | None, dropped: Tally, shown: bool
) -> tuple[ArrowStore, int]:
    """(the store of all passages, how many documents they are)."""
    documents = source.passages(dropped) if source.passages else ()
    writer, read = ArrowWriter(corpus_of(part)), 0
    for document in progress(documents, desc="preparing", unit=" documents", shown=shown):
        if read % _CHECKED_EVERY == 0:
            _check_room(part, out, len(writer))
        read += 1
        _add(writer, matcher, document, cutting, dropped)
    if not len(writer):
        raise UserError(f"{source.describe()} holds no passages: give it at least one with a text")
    _check_room(part, out, len(writer))
    return writer.finish(), read


def _add(writer: ArrowWriter, matcher: Matcher, document: Passage, cutting: Cutting | None, dropped: Tally) -> None:
    """Writes a document as passages: itself, or what it is cut into, numbered."""
    if cutting is None:
        writer.add(document)
        matcher.see(document, document.id)
        return
    number = 0
    for number, chunk in enumerate(cutting.cut(document.text), start=1):
        passage = Passage(f"{document.id}#{number}", document.title, chunk.text)
        writer.add(passage, document.id, chunk.start)
        matcher.see(passage, document.id)
    if not number:
        dropped[NO_CHUNKS] += 1


def _check_room(part: Path, out: Path, passages: int) -> None:
    """Raises UserError before the disk is full, where what is still in memory would fill it."""
    needed, free = _SPARE + passages * _BY_PASSAGE, shutil.disk_usage(part).free
    if free < needed:
        raise UserError(
            f"{out} needs more room: after {passages:,} passages {free:,} bytes are free and at least {needed:,} are "
            "needed; free some space or choose another folder"
        )


def _described(source: Source) -> dict[str, Any]:
    revision, licence = source.facts()
    return {
        "name": source.name,
        "layout": source.layout,
        "folder": str(source.folder.resolve()) if source.folder else None,
        "files": [path.name for path in source.files],
        "revision": revision,
        "licence": licence,
        "notes": list(source.notes),
    }


def _versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("pyarrow", "datasets", "tensorflow-datasets")
    return {"ragjax": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}
