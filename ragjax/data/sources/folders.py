"""A folder as somebody's tools wrote it, recognised by its files.

provenance.json, corpus/                       ragjax.prepare
features.json, dataset_info.json               TFDS
dataset_dict.json, or state.json               datasets.save_to_disk
queries.*, qrels/ (or such folders)            BEIR, MTEB
train.*, dev.* (validation, valid, val), test.*, biencoder-*-train.json, *-test.qa.csv, hotpot_train_*.json
                                               questions, whose columns say whose they are
corpus.*, psgs_w100.*                          passages; else every table with passages and no questions

Other files are ignored.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from ragjax.data.sources.assembly import assemble, is_corpus
from ragjax.data.sources.beir import open_judged, open_judgements
from ragjax.data.sources.dpr import open_answers
from ragjax.data.sources.prepared import is_prepared, open_prepared_source
from ragjax.data.sources.saved import is_saved, open_saved
from ragjax.data.sources.source import SPLIT_NAMES, SPLITS, Source
from ragjax.data.sources.tables import Table, chain, open_table, stem_of, tables_in
from ragjax.data.sources.tfds import is_tfds, open_tfds
from ragjax.errors import UserError

CORPORA = ("corpus", "psgs_w100")
# Stems of files with questions, those with labels first: of one split the first kind that is there is read.
_QUESTIONS = (
    re.compile(rf"(?P<split>{'|'.join(SPLIT_NAMES)})"),
    re.compile(r"biencoder-.*?(?P<split>train|dev)"),
    re.compile(r"hotpot_(?P<split>train|dev)_.*"),
    re.compile(r".*?(?P<split>train|dev|test)\.qa"),
)


def open_folder(folder: Path) -> Source | None:
    """What a folder holds; None where nothing in it is recognised.

    Raises UserError for files that contradict each other, and for columns that nobody writes.
    """
    if is_prepared(folder):
        return open_prepared_source(folder)
    if is_tfds(folder):
        return open_tfds(folder)
    if is_saved(folder):
        return open_saved(folder)
    tables = tables_in(folder)
    if judged := _judgements(folder, tables):
        return _open_beir(folder, tables, judged)
    if not tables and (folder / "data").is_dir():  # where the hub keeps them
        tables = tables_in(folder / "data")
    questions = {split: table for split, table in _by_split(folder, tables).items() if not is_corpus(table)}
    corpus = _corpus_of(folder, tables, questions)
    if questions or corpus:
        return assemble(folder.resolve().name, questions, corpus, folder=folder, notes=_renamed(questions))
    inside = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and any(map(stem_of, path.iterdir()))]
    if inside:
        raise UserError(
            f"{folder} has no data files of its own, but folders that have: name one of {', '.join(inside)}"
        )
    return None


def open_file(path: Path) -> Source:
    """A single file of passages."""
    table = open_table(path)
    if not is_corpus(table):
        raise table.no_columns("passages", '"id", "title" and "text", or "id" and "contents"')
    return assemble(stem_of(path), {}, table, folder=path.parent)


def _by_split(folder: Path, tables: Mapping[str, Table]) -> dict[str, Table]:
    """The tables of questions, in the order train, dev, test."""
    found: dict[str, dict[int, Table]] = {}
    for stem, table in tables.items():
        for rank, pattern in enumerate(_QUESTIONS):
            if match := pattern.fullmatch(stem):
                ranked = found.setdefault(SPLIT_NAMES[match["split"]], {})
                if rank in ranked:
                    names = " and ".join(path.name for path in (ranked[rank].files[0], table.files[0]))
                    raise UserError(f"{folder} has both {names}: remove the one that is out of date")
                ranked[rank] = open_answers(table.files[0]) if stem.endswith(".qa") else table
                break
    return {split: found[split][min(found[split])] for split in SPLITS if split in found}


def _corpus_of(folder: Path, tables: Mapping[str, Table], questions: Mapping[str, Table]) -> Table | None:
    named = [tables[stem] for stem in CORPORA if stem in tables]
    if len(named) > 1:
        names = " and ".join(table.files[0].name for table in named)
        raise UserError(f"{folder} has both {names}: leave one corpus")
    if not named:
        read = {path for table in questions.values() for path in table.files}
        rest = [table for table in tables.values() if not read & set(table.files)]
        named = [table for table in rest if _is_corpus_file(table)]
    return chain(str(folder), named) if named else None


def _is_corpus_file(table: Table) -> bool:
    """`is_corpus`; of a file that nobody named as one, so that what cannot be read is none."""
    try:
        return is_corpus(table)
    except UserError:
        return False


def _renamed(questions: Mapping[str, Table]) -> list[str]:
    dev = questions["dev"].files[0].name if "dev" in questions else "dev."
    return [] if "dev." in dev else [f"dev from {dev}"]


def _judgements(folder: Path, tables: Mapping[str, Table]) -> dict[str, Table]:
    """Judgements by split, where the folder has queries; {} where it has neither."""
    if "queries" not in tables and not (folder / "queries").is_dir():
        return {}
    inside = next((folder / name for name in ("qrels", "data") if (folder / name).is_dir()), None)
    if inside is None:
        return {}
    found: dict[str, Table] = {}
    for stem, table in tables_in(inside).items():
        if split := SPLIT_NAMES.get(stem):
            if split in found:
                names = " and ".join(path.name for path in (found[split].files[0], table.files[0]))
                raise UserError(f"{inside} has both {names}: remove the one that is out of date")
            path = table.files[0]
            found[split] = open_judgements(path) if ".tsv" in path.suffixes else table
    return {split: found[split] for split in SPLITS if split in found}


def _open_beir(folder: Path, tables: Mapping[str, Table], judged: Mapping[str, Table]) -> Source:
    if splits := _by_split(folder, tables):
        own = next(iter(splits.values())).files[0].name
        queries = tables["queries"].files[0].name if "queries" in tables else "queries/"
        raise UserError(f"{folder} has both {own} and {queries} with qrels/: leave one of the two layouts")
    queries, corpus = (_named_or_inside(folder, tables, name) for name in ("queries", "corpus"))
    if queries is None or corpus is None:
        raise UserError(f"{folder} has queries and judgements but no corpus: add corpus.jsonl, as BEIR has it")
    files = [path for table in (corpus, queries, *judged.values()) for path in table.files]
    base = assemble(folder.resolve().name, {}, corpus, folder=folder)
    return Source(
        base.name,
        "BEIR's layout",
        base.passages,
        open_judged(queries, judged),
        folder,
        tuple(files),
        notes=tuple(_renamed(judged)),
        missing="qrels/{split}.tsv",
    )


def _named_or_inside(folder: Path, tables: Mapping[str, Table], name: str) -> Table | None:
    """The table of this name, or all those in the folder of this name."""
    if name in tables:
        return tables[name]
    inside = list(tables_in(folder / name).values()) if (folder / name).is_dir() else []
    return chain(str(folder / name), inside) if inside else None
