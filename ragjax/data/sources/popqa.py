"""PopQA (Mallen et al. 2023), as the hub's akariasai/PopQA has it: 14,267 questions in one split, without passages.

id (a number), question, s_wiki_title, and possible_answers, which is JSON text: '["politician", "political leader"]'

The label is the page of the question's subject, s_wiki_title.
"""

import json

from ragjax.data.lines import Line
from ragjax.data.sources.schema import Schema, strings
from ragjax.data.sources.source import Asked, Label, Tally


def _question(line: Line, tally: Tally) -> Asked | None:
    value = line.record.get("possible_answers")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise line.error('"possible_answers" is no JSON', 'write a list as text, "[\\"...\\"]"') from None
    answers = strings(line.inside({"answers": value}, "the record"), "answers")
    if not answers:
        tally["questions without an answer"] += 1
        return None
    title = line.optional_text("s_wiki_title")
    labels = (Label(title=title),) if title else ()
    return Asked(f"popqa-{line.identifier('id')}", line.text("question"), answers, labels)


POPQA = Schema("PopQA", ("id", "question", "possible_answers", "s_wiki_title"), _question, splits="divided")
