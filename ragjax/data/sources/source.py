"""What a source of data is, whoever made its files: passages one after another, and questions by split."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ragjax.data.questions import Passage

OWN_LAYOUT = "ragjax's own columns"
SPLITS = ("train", "dev", "test")
# A split's own name, and those that other libraries give it.
SPLIT_NAMES = {"train": "train", "dev": "dev", "validation": "dev", "valid": "dev", "val": "dev", "test": "test"}
# Why records were left out, in words -> how many.
Tally = Counter[str]


class Label(NamedTuple):
    """A passage that is right for a question, named by its id, by its page's title, or by both."""

    id: str = ""  # in the source's own corpus
    title: str = ""  # in any corpus
    place: str = ""  # file and line, where a passage that is missing is a fault of that file


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as its source has it: its labels are still to be looked up in a corpus."""

    id: str
    question: str
    answers: tuple[str, ...]
    labels: tuple[Label, ...] = ()


@dataclass(frozen=True)
class Split:
    """where: the file, or what else its questions stand in. questions: all of them, in order, read anew at each call;
    those left out are counted.
    """

    where: str
    questions: Callable[[Tally], Iterator[Asked]]


class Facts(NamedTuple):
    """What a source states about itself; None where it says nothing."""

    revision: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Source:
    """One data set, opened but not read.

    passages: all of them in order, read anew at each call, never all in memory; None where it has none. facts may
    ask whoever publishes the set. notes are what a reader may not expect. missing: what a split that is not there
    would stand in.
    """

    name: str
    layout: str
    passages: Callable[[Tally], Iterator[Passage]] | None
    splits: Mapping[str, Split]
    folder: Path | None = None  # None: it is named
    files: tuple[Path, ...] = ()
    facts: Callable[[], Facts] = Facts
    notes: tuple[str, ...] = field(default=())
    missing: str = "{split}.jsonl"

    @property
    def is_own(self) -> bool:
        """Whether its questions have ragjax's own columns."""
        return self.layout == OWN_LAYOUT

    def describe(self) -> str:
        return f"{self.name} ({self.layout})"


def content_id(prefix: str, *texts: str) -> str:
    """An id for what has none: the same for the same texts, in whichever file and order they stand."""
    digest = hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8)
    return f"{prefix}-{digest.hexdigest()}"
