"""What `datasets` keeps: folders of `save_to_disk`, and tables of its own."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragjax.data.lines import Line
from ragjax.data.sources.assembly import assemble, is_corpus
from ragjax.data.sources.source import SPLIT_NAMES, SPLITS, Facts, Source
from ragjax.data.sources.tables import Table
from ragjax.errors import UserError, reason

if TYPE_CHECKING:
    import datasets

_ROWS_AT_ONCE = 512


def import_datasets(what: str) -> Any:
    """The library. Raises UserError, naming the command that brings it, where `what` needs it and it is missing."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{what} needs the package datasets: pip install 'ragjax[datasets]'") from None
    return datasets


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_saved(folder: Path) -> Source:
    """A DatasetDict, whose splits are train, dev (validation, valid, val), test and corpus; or a Dataset, one of these.

    Raises UserError where `datasets` is missing, and for a folder that it cannot read.
    """
    library = import_datasets(f"{folder}, which its save_to_disk wrote,")
    try:
        found = library.load_from_disk(str(folder))
    except Exception as error:  # what it raises for damaged folders has no kind in common
        raise UserError(f"{folder} cannot be read ({reason(error)}): save it again") from error
    named = {str(found.split or "train"): found} if isinstance(found, library.Dataset) else dict(found)
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("cache-")))
    tables = {name: table_of(f"{folder}, split {name}", dataset, files) for name, dataset in named.items()}
    questions, corpus = split_tables(str(folder), tables)
    licence = next((dataset.info.license for dataset in named.values() if dataset.info.license), None)
    return assemble(folder.resolve().name, questions, corpus, folder=folder, facts=lambda: Facts(None, licence))


def table_of(where: str, dataset: "datasets.Dataset", files: tuple[Path, ...] = ()) -> Table:
    """The rows of a memory-mapped dataset."""

    def read() -> Iterator[Line]:
        number = 0
        for batch in dataset.with_format("arrow").iter(_ROWS_AT_ONCE):
            for record in batch.to_pylist():
                number += 1
                yield Line(where, number, record, "row")

    return Table(where, lambda: dataset.column_names, read, files)


def split_tables(where: str, tables: dict[str, Table]) -> tuple[dict[str, Table], Table | None]:
    """(questions by split, the corpus) of splits as `datasets` and TFDS name them; others are ignored.

    Raises UserError where none of them is one that ragjax knows.
    """
    corpora = [table for table in tables.values() if is_corpus(table)]
    asking = {
        SPLIT_NAMES[name]: table for name, table in tables.items() if name in SPLIT_NAMES and table not in corpora
    }
    if not (asking or corpora):
        found = ", ".join(tables)
        raise UserError(f"{where} has the splits {found}: rename those to be used to train, dev, test or corpus")
    if len(corpora) > 1:
        raise UserError(f"{where} has passages in several splits: leave one, and name it corpus")
    return {split: asking[split] for split in SPLITS if split in asking}, corpora[0] if corpora else None
