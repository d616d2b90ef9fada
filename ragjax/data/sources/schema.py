"""How the records of one maker are read: what tells them from others, and what becomes of their columns."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ragjax.data.lines import Line
from ragjax.data.questions import Passage
from ragjax.data.sources.source import Asked, Tally


@dataclass(frozen=True)
class Schema:
    """Reads a record at a time.

    columns: those that a table of such questions has, and that tell it from others. question: None leaves the record
    out, and counts it. passages: those that stand in the records of questions.
    splits: "kept" as they stand; "published" without a test, which dev then is, and train gives a new dev; "divided"
    from one into three. group: questions of one group come into one split where splits are made. is_withheld: the
    answers of the test questions are not published. is_strict: an id that occurs twice is an error, and not left out.
    """

    name: str
    columns: tuple[str, ...]
    question: Callable[[Line, Tally], Asked | None]
    passages: Callable[[Line], Iterator[Passage]] | None = None
    splits: Literal["kept", "published", "divided"] = "kept"
    group: Callable[[Line], str] = lambda line: line.text("question")
    is_withheld: bool = False
    is_strict: bool = False


def strings(line: Line, key: str) -> tuple[str, ...]:
    """The texts of the list under a key, each once and without those that are empty; a single text is one of them, and
    a number is written out.
    """
    value = line.record.get(key)
    items = value if isinstance(value, list) else [] if value is None else [value]
    texts = [str(item) if isinstance(item, int | float) else item for item in items]
    kept = [text for text in texts if text is not None and text != "" and not str(text).isspace()]
    return tuple(dict.fromkeys(line.inside({key: kept}, key).optional_texts(key)))
