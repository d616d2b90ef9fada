"""HotPotQA (Yang et al. 2018), as the hub's hotpotqa/hotpot_qa has it, and as its makers' own JSON files do.

question, answer, type, level, id (_id in the makers' files)
supporting_facts   {"title": [...], "sent_id": [...]}     or [[title, sent_id], ...]
context            {"title": [...], "sentences": [[...]]} or [[title, [sentence, ...]], ...]

A passage is a paragraph of a context, its sentences put together; one that stands in several records is kept once. The
paragraphs of the supporting facts are the positives: those of the question's own context, else (as happens in the
fullwiki setting, where the context is what a search found) by their title.
"""

from collections.abc import Iterator
from typing import Any

from ragjax.data.lines import Line
from ragjax.data.questions import Passage
from ragjax.data.sources.schema import Schema
from ragjax.data.sources.source import Asked, Label, Tally, content_id


def _passages(line: Line) -> Iterator[Passage]:
    for title, sentences in _pairs(line, "context", "sentences"):
        text = "".join(map(str, sentences)) if isinstance(sentences, list) else ""
        text = " ".join(text.split())
        if isinstance(title, str) and title.strip() and text:
            yield Passage(content_id("hotpotqa", title.strip(), text), title.strip(), text)


def _question(line: Line, tally: Tally) -> Asked | None:
    if not line.optional_text("answer"):
        tally["questions without an answer"] += 1
        return None
    own = {passage.title: passage.id for passage in _passages(line)}
    titles = [title.strip() for title, _ in _pairs(line, "supporting_facts", "sent_id") if isinstance(title, str)]
    labels = [Label(own.get(title, ""), title) for title in dict.fromkeys(titles)]
    return Asked(line.identifier("id", "_id"), line.text("question"), (line.text("answer"),), tuple(labels))


def _pairs(line: Line, key: str, second: str) -> list[tuple[Any, Any]]:
    """(title, what stands beside it) of either spelling."""
    value = line.record.get(key)
    if isinstance(value, dict) and isinstance(value.get("title"), list) and isinstance(value.get(second), list):
        return list(zip(value["title"], value[second], strict=False))
    if isinstance(value, list) and all(isinstance(item, list) and len(item) == 2 for item in value):
        return [(title, beside) for title, beside in value]
    raise line.error(f'"{key}" is not as in HotPotQA', f'write {{"title": [...], "{second}": [...]}}')


HOTPOTQA = Schema(
    "HotPotQA",
    ("question", "answer", "supporting_facts", "context"),
    _question,
    _passages,
    splits="published",
    is_withheld=True,
)
