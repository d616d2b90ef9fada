"""NQ-open (Lee et al. 2019), as the hub's google-research-datasets/nq_open and TFDS have it.

question, answer   a list of accepted answers

It has no ids, no passages and no labels.
"""

from ragjax.data.lines import Line
from ragjax.data.sources.schema import Schema, strings
from ragjax.data.sources.source import Asked, Tally, content_id


def _question(line: Line, tally: Tally) -> Asked | None:
    question, answers = line.text("question"), strings(line, "answer")
    if not answers:
        tally["questions without an answer"] += 1
        return None
    identity = content_id("nq", question) if line.record.get("id") is None else line.identifier("id")
    return Asked(identity, question, answers)


NQ_OPEN = Schema("NQ-open", ("question", "answer"), _question, splits="published")
