"""SQuAD (Rajpurkar et al. 2016), as the hub's rajpurkar/squad and TFDS have it.

id, title, context, question, answers {"text": [...], "answer_start": [...]}

A passage is a context, kept once, and the positive of its questions. Of SQuAD 2.0 the questions that cannot be answered
are left out. Train is divided by article, so that no dev question has a passage that was trained on.
"""

from collections.abc import Iterator

from ragjax.data.lines import Line
from ragjax.data.questions import Passage
from ragjax.data.sources.schema import Schema, strings
from ragjax.data.sources.source import Asked, Label, Tally, content_id


def _passages(line: Line) -> Iterator[Passage]:
    # The hub spells titles as addresses do: University_of_Notre_Dame.
    title, text = line.optional_text("title").replace("_", " ").strip(), line.text("context").strip()
    yield Passage(content_id("squad", title, text), title, text)


def _question(line: Line, tally: Tally) -> Asked | None:
    found = line.record.get("answers")
    # Sets made after SQuAD's example often have a plain list.
    answers = strings(line, "answers") if isinstance(found, list) else strings(line.inside(found, '"answers"'), "text")
    if not answers:
        tally["questions without an answer"] += 1
        return None
    passage = next(_passages(line))
    label = Label(passage.id, passage.title)
    return Asked(line.identifier("id"), line.text("question").strip(), answers, (label,))


SQUAD = Schema(
    "SQuAD",
    ("question", "context", "answers"),
    _question,
    _passages,
    splits="published",
    group=lambda line: line.optional_text("title") or line.text("context"),
)
