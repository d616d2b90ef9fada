"""DPR's layout (Karpukhin et al. 2020).

psgs_w100.tsv               id, text, title under a header
biencoder-nq-train.json     a list of {"question", "answers", "positive_ctxs": [{"title", "text", "passage_id"}], ...};
                            TriviaQA's files say "psg_id"
nq-test.qa.csv              question, tab, a Python list of answers; no header

A positive is known by its passage's id, where psgs_w100.tsv stands beside it. Without that file the corpus is made of
what the questions bring with them: positive_ctxs, negative_ctxs and hard_negative_ctxs. As in DPR itself a question
gets straight apostrophes. The .qa.csv files have no labels, and serve splits without a biencoder file.
"""

import ast
import csv
from collections.abc import Iterator
from pathlib import Path

from ragjax.data.lines import Line, raw_lines
from ragjax.data.questions import Passage
from ragjax.data.sources.schema import Schema, strings
from ragjax.data.sources.source import Asked, Label, Tally, content_id
from ragjax.data.sources.tables import Table
from ragjax.errors import UserError

_CONTEXTS = ("positive_ctxs", "negative_ctxs", "hard_negative_ctxs")
_PREFIX = "wiki:"  # how DPR's later files name passages of psgs_w100


def _question(line: Line, tally: Tally) -> Asked:
    text = line.text("question").replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    labels = [Label(passage.id, passage.title) for passage in _contexts(line, "positive_ctxs")]
    return Asked(content_id("dpr", text), text, strings(line, "answers"), tuple(dict.fromkeys(labels)))


def _passages(line: Line) -> Iterator[Passage]:
    for key in _CONTEXTS:
        yield from _contexts(line, key)


def _contexts(line: Line, key: str) -> Iterator[Passage]:
    for item in line.record.get(key) or []:
        context = line.inside(item, f'an entry of "{key}"')
        title, text = context.optional_text("title"), context.text("text")
        if context.record.get("passage_id") is None and context.record.get("psg_id") is None:
            yield Passage(content_id("dpr", title, text), title, text)
        else:
            identity = context.identifier("passage_id", "psg_id").removeprefix(_PREFIX)
            yield Passage(identity, title, text)


def open_answers(path: Path) -> Table:
    """The questions of a .qa.csv file, as a table that NQ-open's columns fit."""

    def read() -> Iterator[Line]:
        for number, data in raw_lines(path):
            try:
                question, answers = next(csv.reader([data.decode().rstrip("\r\n")], delimiter="\t"))
                yield Line(path, number, {"question": question, "answer": ast.literal_eval(answers)})
            except (ValueError, SyntaxError, csv.Error):
                fault = f"{path}, line {number}: not a question, a tab and a list of answers"
                raise UserError(f"{fault}; write them so, as in DPR's .qa.csv files") from None

    return Table(str(path), lambda: ("question", "answer"), read, (path,))


DPR = Schema("DPR's layout", ("question", "answers", "positive_ctxs"), _question, _passages)
