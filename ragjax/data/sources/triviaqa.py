"""TriviaQA (Joshi et al. 2017), as the hub's mandarjoshi/trivia_qa and TFDS have it.

question, question_id, answer {"value", "aliases", ...}
entity_pages     {"title": [...], "wiki_context": [...], ...}      articles of Wikipedia
search_results   {"title": [...], "search_context": [...], ...}    pages of the web

Passages are these articles and pages as a whole, each once: many are long, so cut them (--chunk). Those of a question
are its positives; TriviaQA holds them to be evidence because they contain an answer. Configurations that end in
.nocontext have none. rc has a question once for Wikipedia and once for the web: the first is kept.
"""

from collections.abc import Iterator

from ragjax.data.lines import Line
from ragjax.data.questions import Passage
from ragjax.data.sources.schema import Schema, strings
from ragjax.data.sources.source import Asked, Label, Tally, content_id

_WITHHELD = "<unk>"  # what stands for the answers of the test questions


def _passages(line: Line) -> Iterator[Passage]:
    for key, content in (("entity_pages", "wiki_context"), ("search_results", "search_context")):
        for title, text in _pages(line, key, content):
            if text.strip():
                yield Passage(content_id("triviaqa", title, text), title, text.strip())


def _pages(line: Line, key: str, content: str) -> list[tuple[str, str]]:
    """(title, text) of the pages under a key; the text is empty where only the title is known."""
    pages = line.record.get(key)
    if not isinstance(pages, dict):
        return []
    titles, texts = pages.get("title") or [], pages.get(content) or []
    count = max(len(titles), len(texts))
    padded = ([*values, *[""] * (count - len(values))] for values in (titles, texts))
    return [(str(title or "").strip(), str(text or "")) for title, text in zip(*padded, strict=True)]


def _question(line: Line, tally: Tally) -> Asked | None:
    answer = line.inside(line.record.get("answer"), '"answer"')
    value = strings(answer, "value")
    answers = tuple(dict.fromkeys((*value, *strings(answer, "aliases"))))
    if not value or value == (_WITHHELD,):
        tally["questions without an answer"] += 1
        return None
    named = [title for title, text in _pages(line, "entity_pages", "wiki_context") if title and not text.strip()]
    labels = [Label(passage.id, passage.title) for passage in _passages(line)] + [Label(title=title) for title in named]
    return Asked(line.identifier("question_id"), line.text("question"), answers, tuple(dict.fromkeys(labels)))


TRIVIAQA = Schema(
    "TriviaQA",
    ("question", "question_id", "answer", "entity_pages"),
    _question,
    _passages,
    splits="published",
    is_withheld=True,
)
