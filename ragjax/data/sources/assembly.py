"""A source from tables: which of them are questions of which split, and where the passages are.

Splits that a set does not have are made from those it has, always the same ones: a question's side follows from a hash
of its words (of its article, in SQuAD), so it depends on neither the order of the records nor their number.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ragjax.data.lines import Line
from ragjax.data.questions import Passage
from ragjax.data.sources.dpr import DPR
from ragjax.data.sources.flashrag import FLASHRAG, read_contents
from ragjax.data.sources.hotpotqa import HOTPOTQA
from ragjax.data.sources.nq_open import NQ_OPEN
from ragjax.data.sources.own import LABELLED, OWN, read_passage
from ragjax.data.sources.popqa import POPQA
from ragjax.data.sources.schema import Schema
from ragjax.data.sources.source import SPLITS, Asked, Facts, Source, Split, Tally, content_id
from ragjax.data.sources.squad import SQUAD
from ragjax.data.sources.tables import Table
from ragjax.data.sources.triviaqa import TRIVIAQA

# A table is of the first whose columns it has.
SCHEMAS = (LABELLED, HOTPOTQA, POPQA, TRIVIAQA, DPR, SQUAD, FLASHRAG, OWN, NQ_OPEN)
CORPUS = "a corpus"

_PARTS = 100
_DEV_OF_TRAIN = range(5)  # of 100 parts of train, where dev has become test
_DIVIDED = {"test": range(15), "dev": range(15, 20), "train": range(20, _PARTS)}


@dataclass(frozen=True)
class _Share:
    """The records of a table that lie on one side of a division; parts None: all of them."""

    table: Table
    schema: Schema
    parts: range | None = None

    def records(self) -> Iterator[Line]:
        for line in self.table.read():
            if self.parts is None or _part_of(self.schema.group(line)) in self.parts:
                yield line


def schema_of(table: Table) -> Schema:
    """How the records of a table of questions are read. Raises UserError, naming its columns, where nothing fits."""
    found = find_schema(table.columns)
    if found is None:
        raise table.no_columns("questions as ragjax or another maker writes them", '"id", "question" and "answers"')
    return found


def find_schema(columns: Sequence[str]) -> Schema | None:
    return next((schema for schema in SCHEMAS if set(schema.columns) <= set(columns)), None)


def is_foreign(columns: Sequence[str]) -> bool:
    """Whether records with these columns are a maker's who is not ragjax."""
    schema = find_schema(columns)
    is_other_corpus = "contents" in columns and "text" not in columns
    return is_other_corpus or (schema is not None and schema not in (OWN, LABELLED, NQ_OPEN))


def is_corpus(table: Table) -> bool:
    """Whether a table holds passages and no questions."""
    return (table.has("text") or table.has("contents")) and not table.has("question")


def assemble(
    name: str,
    tables: Mapping[str, Table],
    corpus: Table | None,
    *,
    schemas: Mapping[str, Schema] | None = None,
    folder: Path | None = None,
    facts: Callable[[], Facts] = Facts,
    notes: Sequence[str] = (),
) -> Source:
    """A source of tables by split (train, dev, test), and of a table of passages.

    schemas: by split, where they are known without looking into the tables. Raises UserError for columns that nobody
    writes.
    """
    schemas = schemas or {split: schema_of(table) for split, table in tables.items() if table.columns}
    shares, made = _arranged({split: _Share(tables[split], schema) for split, schema in schemas.items()})
    passages = None
    if corpus is not None:
        passages = functools.partial(_read_corpus, corpus, folder is not None)
    elif any(schema.passages for schema in schemas.values()):
        passages = functools.partial(_read_passages, list(shares.values()))
    layout = next(iter(schemas.values())).name if schemas else CORPUS
    files = [path for table in (*tables.values(), *([corpus] if corpus else [])) for path in table.files]
    splits = {
        split: Split(share.table.where, functools.partial(_read_questions, share)) for split, share in shares.items()
    }
    return Source(name, layout, passages, splits, folder, tuple(files), facts, (*notes, *made))


def _arranged(shares: Mapping[str, _Share]) -> tuple[dict[str, _Share], list[str]]:
    """The splits as they are used, and in words what was made of which."""
    if not shares:
        return {}, []
    found = dict(shares)
    first = next(iter(found.values())).schema
    if first.is_withheld and len(found) > 1:
        found.pop("test", None)
    if first.splits == "divided" and len(found) == 1:
        (share,) = found.values()
        parts = {split: _Share(share.table, first, _DIVIDED[split]) for split in SPLITS}
        return parts, ["80 % of the questions are train, 5 % dev and 15 % test, by a hash of their words"]
    if first.splits != "published" or "test" in found or "dev" not in found:
        return found, []
    found["test"] = found.pop("dev")
    if train := found.pop("train", None):
        share = _Share(train.table, train.schema, _DEV_OF_TRAIN)
        rest = _Share(train.table, train.schema, range(_DEV_OF_TRAIN.stop, _PARTS))
        return {"train": rest, "dev": share, **found}, ["test is what was published as validation, dev 5 % of train"]
    return found, ["test is what was published as validation"]


def _part_of(group: str) -> int:
    digest = hashlib.blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _PARTS


def _read_questions(share: _Share, tally: Tally) -> Iterator[Asked]:
    seen: set[str] = set()
    for line in share.records():
        asked = share.schema.question(line, tally)
        if asked is None:
            continue
        if asked.id not in seen:
            seen.add(asked.id)
            yield asked
        elif share.schema.is_strict:
            raise line.error(f'the id "{asked.id}" occurs twice', "give every question an id of its own")
        else:
            tally["questions whose id had been there already"] += 1


def _read_passages(shares: Sequence[_Share], tally: Tally) -> Iterator[Passage]:
    """What stands in the records of questions, each passage once."""
    seen: set[str] = set()
    # Both sides of a division are one table.
    for table, schema in {id(share.table): (share.table, share.schema) for share in shares}.values():
        for line in table.read() if schema.passages else ():
            for passage in schema.passages(line) if schema.passages else ():
                if passage.id in seen:
                    tally["passages that had been there already"] += 1
                else:
                    seen.add(passage.id)
                    yield passage


def _read_corpus(table: Table, is_strict: bool, tally: Tally) -> Iterator[Passage]:
    """A table of passages. is_strict: one without title and text is an error, and not left out."""
    if not (table.has("text") or table.has("contents")):
        raise table.no_columns("passages", '"id", "title" and "text", or "id" and "contents"')
    read = read_passage if table.has("text") else read_contents
    has_ids = table.has("id") or table.has("_id")
    for line in table.read():
        if not has_ids:
            line.record["id"] = content_id("passage", line.optional_text("title"), line.optional_text("text"))
        if is_strict or any(map(line.optional_text, ("text", "title", "contents"))):
            yield read(line)
        else:
            tally["passages without text"] += 1
