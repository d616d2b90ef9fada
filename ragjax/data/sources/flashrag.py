"""FlashRAG's layout (Jin et al. 2024).

train.jsonl, dev.jsonl, test.jsonl   {"id", "question", "golden_answers", "metadata"}
corpus.jsonl                         {"id", "contents"}, where contents is a title, a line break and the text

A title may stand in double quotes, as in its wiki18_100w; without a line break all of it is text. Labels are titles:
`supporting_facts` of HotPotQA's and 2WikiMultihopQA's metadata, and `s_wiki_title` of PopQA's.
"""

from typing import Any

from ragjax.data.lines import Line
from ragjax.data.questions import Passage
from ragjax.data.sources.schema import Schema, strings
from ragjax.data.sources.source import Asked, Label, Tally


def read_contents(line: Line) -> Passage:
    """A passage of a corpus with "contents"."""
    first, _, rest = line.text("contents").partition("\n")
    title = first.strip().removeprefix('"').removesuffix('"').strip()
    identity = line.identifier("id", "_id")
    return Passage(identity, title, rest.strip()) if title and rest.strip() else Passage(identity, "", title or rest)


def _question(line: Line, tally: Tally) -> Asked:
    metadata = line.record.get("metadata")
    titles = _titles(metadata) if isinstance(metadata, dict) else []
    labels = [Label(title=title) for title in dict.fromkeys(titles)]
    return Asked(line.identifier("id"), line.text("question"), strings(line, "golden_answers"), tuple(labels))


def _titles(metadata: dict[str, Any]) -> list[str]:
    facts = metadata.get("supporting_facts")
    titles = facts.get("title") if isinstance(facts, dict) else [metadata.get("s_wiki_title")]
    return [title for title in titles or [] if isinstance(title, str) and title.strip()]


FLASHRAG = Schema("FlashRAG's layout", ("question", "golden_answers"), _question)
