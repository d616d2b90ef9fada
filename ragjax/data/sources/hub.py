"""Named sets, from the hub or its cache through `datasets`; nothing of theirs is run, they are tables.

Each is read as its own file of this room says, from here as from a folder with the same tables.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

from ragjax.data.sources.assembly import assemble
from ragjax.data.sources.hotpotqa import HOTPOTQA
from ragjax.data.sources.nq_open import NQ_OPEN
from ragjax.data.sources.popqa import POPQA
from ragjax.data.sources.saved import import_datasets, table_of
from ragjax.data.sources.schema import Schema
from ragjax.data.sources.source import Facts, Source
from ragjax.data.sources.squad import SQUAD
from ragjax.data.sources.tables import Table
from ragjax.data.sources.triviaqa import TRIVIAQA
from ragjax.errors import UserError, reason


class HubSet(NamedTuple):
    """A set on the hub. configuration: the one that is meant where none is named. licence: as its makers state it.

    splits: by ours, the hub's; those without answers are left out. schema: of its questions; None for passages.
    """

    id: str
    configuration: str | None
    licence: str | None
    splits: Mapping[str, str]
    schema: Schema | None


_PUBLISHED = {"train": "train", "dev": "validation"}
HUB_SETS = {
    "hotpotqa": HubSet("hotpotqa/hotpot_qa", "distractor", "CC BY-SA 4.0", _PUBLISHED, HOTPOTQA),
    "popqa": HubSet("akariasai/PopQA", None, "MIT", {"test": "test"}, POPQA),
    "squad": HubSet("rajpurkar/squad", None, "CC BY-SA 4.0", _PUBLISHED, SQUAD),
    "nq_open": HubSet("google-research-datasets/nq_open", None, "CC BY-SA 3.0", _PUBLISHED, NQ_OPEN),
    "triviaqa": HubSet("mandarjoshi/trivia_qa", "rc.wikipedia", None, _PUBLISHED, TRIVIAQA),
    "wikipedia": HubSet("wikimedia/wikipedia", "20231101.en", "CC BY-SA 3.0 and GFDL", {"corpus": "train"}, None),
}


def find_hub_set(name: str) -> tuple[str, HubSet] | None:
    """(its name with the configuration, the set) for NAME, NAME/CONFIGURATION, or the same with the hub's own id."""
    for short, found in HUB_SETS.items():
        for spelled in (found.id, short):  # the former may begin with the latter
            if name == spelled or name.startswith(f"{spelled}/"):
                configuration = name.removeprefix(spelled).removeprefix("/") or found.configuration
                return "/".join(filter(None, (short, configuration))), found._replace(configuration=configuration)
    return None


def open_hub_set(name: str, found: HubSet) -> Source:
    """A set of the hub; it is fetched when it is read. The reading raises UserError where `datasets` is missing, or the
    set is neither in reach nor in the cache.
    """
    fetch = functools.cache(lambda split: _fetch(name, found, split))  # of a set that is divided, read for each part

    def table(split: str) -> Table:
        where = f"{found.id}, split {split}"
        return Table(where, lambda: fetch(split).columns, lambda: fetch(split).read())

    tables = {ours: table(theirs) for ours, theirs in found.splits.items()}
    corpus = tables.pop("corpus", None)
    schemas = {split: found.schema for split in tables if found.schema}
    return assemble(name, tables, corpus, schemas=schemas, facts=lambda: _facts(name, found))


def _fetch(name: str, found: HubSet, split: str) -> Table:
    library = import_datasets(f"the data set {name}")
    try:
        dataset = library.load_dataset(found.id, found.configuration, split=split)
    except Exception as error:  # of the network, the cache, the disk or a configuration that is not there
        raise _out_of_reach(name, found, error) from error
    table = table_of(f"{found.id}, split {split}", dataset)
    needed = found.schema.columns if found.schema else ("text",)
    if missing := [column for column in needed if not table.has(column)]:
        raise table.no_columns(f'column "{missing[0]}"', ", ".join(needed))
    return table


def _facts(name: str, found: HubSet) -> Facts:
    try:
        builder = import_datasets(f"the data set {name}").load_dataset_builder(found.id, found.configuration)
    except UserError:
        raise
    except Exception as error:
        raise _out_of_reach(name, found, error) from error
    return Facts(builder.hash, found.licence)


def _out_of_reach(name: str, found: HubSet, error: Exception) -> UserError:
    return UserError(
        f"the data set {name} could not be had from the hub or its cache ({reason(error)}): check the connection and "
        f"the configuration's name, or give a folder with the files of {found.id}"
    )
