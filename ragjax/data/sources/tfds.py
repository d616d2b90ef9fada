"""TensorFlow Datasets, read without TensorFlow: as data sources, for which the files have to be array_record.

Text arrives as bytes. Sets are read by the columns of the others: squad, trivia_qa and natural_questions_open are those
of the hub, wikipedia/* is a corpus, and a set that you built yourself may have ragjax's own.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ragjax.data.lines import Line
from ragjax.data.sources.assembly import assemble
from ragjax.data.sources.saved import split_tables
from ragjax.data.sources.source import Facts, Source
from ragjax.data.sources.tables import Table
from ragjax.errors import UserError, reason
from ragjax.files import read_json_object

_FORMAT = "array_record"


def is_tfds(folder: Path) -> bool:
    """Whether TFDS wrote a folder: that of a version, as NAME/CONFIG/1.0.0 below its data_dir."""
    return (folder / "features.json").is_file() and (folder / "dataset_info.json").is_file()


def open_tfds(folder: Path) -> Source:
    """A prepared set. Raises UserError where TFDS is missing, the files are of another format, or cannot be read."""
    info = read_json_object(folder / "dataset_info.json")
    written = info.get("fileFormat", "tfrecord")
    if written != _FORMAT:
        raise UserError(
            f"{folder} has files of the format {written}, which only TensorFlow reads: prepare the set again with "
            f'tfds.builder(..., file_format="{_FORMAT}")'
        )
    library = _import(f"{folder}, which TFDS wrote,")
    builder = _guarded(str(folder), lambda: library.builder_from_directory(str(folder)))
    files = tuple(sorted(path for path in folder.iterdir() if path.is_file()))
    stated = info.get("redistributionInfo")
    licence = stated.get("license") if isinstance(stated, Mapping) else None
    return _assembled(
        str(info.get("name", folder.name)), str(folder), builder, Facts(info.get("version"), licence), files
    )


def open_named_tfds(name: str) -> Source:
    """A set by its name in TFDS's catalogue (wikipedia/20230601.en), prepared now where it is not yet.

    Raises UserError where TFDS is missing, or cannot find or make the set.
    """
    where = f"tfds:{name}"
    library = _import(where)
    builder = _guarded(where, lambda: library.builder(name, file_format=_FORMAT))
    _guarded(where, builder.download_and_prepare)
    facts = Facts(str(builder.version), builder.info.redistribution_info.license or None)
    return _assembled(where if ":" in name else f"{where}:{builder.version}", where, builder, facts)


def _assembled(name: str, where: str, builder: Any, facts: Facts, files: tuple[Path, ...] = ()) -> Source:
    columns = tuple(builder.info.features)

    def table(split: str) -> Table:
        place = f"{where}, split {split}"
        return Table(place, lambda: columns, lambda: _read(place, lambda: builder.as_data_source(split)), files)

    questions, corpus = split_tables(where, {split: table(split) for split in builder.info.splits})
    return assemble(name, questions, corpus, folder=Path(where) if files else None, facts=lambda: facts)


def _read(where: str, source: Callable[[], Any]) -> Iterator[Line]:
    examples = _guarded(where, source)
    for number in range(len(examples)):
        record = _guarded(where, lambda number=number: examples[number])
        yield Line(where, number + 1, _plain(record), "example")


def _plain(value: Any) -> Any:
    """An example's value as JSON has it."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _import(what: str) -> Any:
    try:
        import tensorflow_datasets
    except ImportError:
        raise UserError(f"{what} needs the package tensorflow-datasets: pip install 'ragjax[tfds]'") from None
    return tensorflow_datasets


def _guarded(where: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # what it raises has no kind in common
        raise UserError(f"{where} cannot be read ({reason(error)}): prepare the set again with TFDS") from error
