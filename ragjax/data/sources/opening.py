"""A source by the name that a user gives: a local folder comes first, then the named sets."""

import os
from pathlib import Path

from ragjax.data.sources.folders import open_file, open_folder
from ragjax.data.sources.hub import HUB_SETS, find_hub_set, open_hub_set
from ragjax.data.sources.source import Source
from ragjax.data.sources.tables import stem_of
from ragjax.data.sources.tfds import open_named_tfds
from ragjax.errors import UserError
from ragjax.paths import expanded

SAMPLE_FOLDER = Path(__file__).parent.parent / "sample"
_TFDS = "tfds:"
NAMES = ("sample", *HUB_SETS, f"{_TFDS}NAME")


def open_source(name_or_dir: str | Path) -> Source:
    """A data set by name or folder. Raises UserError where there is none, or its files are nobody's."""
    name = str(name_or_dir)
    folder = find_folder(name)
    if folder is None:
        return open_named(name)
    found = open_folder(folder)
    if found is None:
        raise UserError(f"{folder} has no data that ragjax knows: docs/data.md shows the files of each layout")
    return found


def open_corpus(name_or_dir: str | Path) -> Source:
    """`open_source` of something with passages, which may be a single file. Raises UserError where it has none."""
    name = str(name_or_dir)
    path = Path(expanded(name))
    is_file = bool(name) and os.path.isfile(path) and bool(stem_of(path))
    found = open_file(path) if is_file else open_source(name)
    if found.passages is None:
        raise UserError(f"{found.describe()} has no passages: name a corpus that has")
    return found


def find_folder(name: str) -> Path | None:
    """The local folder of a name, or the sample's; None for what is to be named. Raises UserError for a file."""
    folder = Path(expanded(name))
    if name and os.path.isdir(folder):
        return folder
    if name == "sample":
        return SAMPLE_FOLDER
    if name and os.path.exists(folder):
        raise UserError(f"{name} is a file, not a data folder: pass the folder that holds corpus.jsonl and its splits")
    return None


def open_named(name: str) -> Source:
    """A set that is no local folder. Raises UserError for an unknown name."""
    if found := find_hub_set(name):
        return open_hub_set(*found)
    if name.startswith(_TFDS):
        return open_named_tfds(name.removeprefix(_TFDS))
    raise UserError(
        f'there is no data folder "{name}": pass an existing folder, --data=sample for the built-in one, or one of the '
        f"names {', '.join(NAMES[1:])}"
    )
