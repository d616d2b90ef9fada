"""ragjax's own columns, in whatever kind of table.

corpus             id, title, text                          "_id" for id, as BEIR has it
train, dev, test   id, question, answers, positive_ids      positive_ids may be left out, answers too
"""

from ragjax.data.lines import Line
from ragjax.data.questions import Passage
from ragjax.data.sources.schema import Schema
from ragjax.data.sources.source import OWN_LAYOUT, Asked, Label, Tally


def read_passage(line: Line) -> Passage:
    """A passage; where "text" is empty the title is the text."""
    identity, title = line.identifier("id", "_id"), line.optional_text("title")
    if title and not line.optional_text("text"):  # as collections of papers have them without an abstract
        return Passage(identity, "", title)
    return Passage(identity, title, line.text("text"))


def _question(line: Line, tally: Tally) -> Asked:
    labels = [Label(id=positive, place=line.place) for positive in dict.fromkeys(line.optional_texts("positive_ids"))]
    return Asked(line.identifier("id"), line.text("question"), line.optional_texts("answers"), tuple(labels))


OWN = Schema(OWN_LAYOUT, ("id", "question", "answers"), _question, is_strict=True)
# Labels without answers serve retrieval alone.
LABELLED = Schema(OWN_LAYOUT, ("id", "question", "positive_ids"), _question, is_strict=True)
