"""BEIR's layout (Thakur et al. 2021), and that of MTEB: queries, and which passages answer them, without answers.

corpus.jsonl      {"_id", "title", "text"}    read as any other corpus
queries.jsonl     {"_id", "text"}; what BEIR's hotpotqa has as metadata.answer is the answer
qrels/SPLIT.tsv   query-id, corpus-id and score, under a header; a score above 0 marks a positive

MTEB has the same columns in .jsonl and .parquet too, and folders corpus/, queries/ and qrels/ (or data/) of such files.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from ragjax.data.lines import Line, raw_lines
from ragjax.data.sources.source import Asked, Label, Split
from ragjax.data.sources.tables import Table
from ragjax.errors import UserError


def open_judged(queries: Table, judged: Mapping[str, Table]) -> dict[str, Split]:
    """Splits from queries and, by split, the judgements of them.

    Reading raises UserError, naming file and line, for a bad line, a query's id that occurs twice, and a judgement of a
    query that is not there.
    """
    read = functools.cache(lambda: _read_queries(queries))  # once for all splits
    return {
        split: Split(queries.where, lambda tally, table=table: _judge(read(), table)) for split, table in judged.items()
    }


def _read_queries(table: Table) -> dict[str, Asked]:
    queries: dict[str, Asked] = {}
    for line in table.read():
        identity = line.identifier("id", "_id")
        if identity in queries:
            raise line.error(f'the id "{identity}" occurs twice', "give every query an id of its own")
        metadata = line.record.get("metadata")
        answer = metadata.get("answer") if isinstance(metadata, dict) else None
        answers = (answer,) if isinstance(answer, str) and answer.strip() else ()
        queries[identity] = Asked(identity, line.text("text"), answers)
    return queries


def _judge(queries: Mapping[str, Asked], judgements: Table) -> Iterator[Asked]:
    """The queries that are judged, in their own order, each with its positives."""
    positives: dict[str, dict[str, Label]] = {}
    for line in judgements.read():
        query, passage = line.identifier("query-id"), line.identifier("corpus-id")
        if query not in queries:
            raise line.error(f'the query id "{query}" is not among the queries', "add that query or remove the line")
        found = positives.setdefault(query, {})
        score = line.record.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float) or math.isnan(score):
            raise line.error(f'"score" is {score!r}', "write a number")
        if score > 0:
            found.setdefault(passage, Label(id=passage, place=line.place))
    for query in queries.values():
        if query.id in positives:
            yield Asked(query.id, query.question, query.answers, tuple(positives[query.id].values()))


def open_judgements(path: Path) -> Table:
    """The judgements of a .tsv file."""

    def read() -> Iterator[Line]:
        for number, data in raw_lines(path):
            try:
                columns = data.decode("utf-8-sig" if number == 1 else "utf-8").strip().split("\t")
                if columns == [""]:
                    continue
                query, passage, score = columns
                if number == 1 and score == "score":
                    continue
                yield Line(path, number, {"query-id": query, "corpus-id": passage, "score": float(score)})
            except ValueError:  # also bytes that are no text
                fault = f"{path}, line {number}: not a query's id, a passage's id and a number"
                raise UserError(f"{fault}; write these three with tabs between them") from None

    return Table(str(path), lambda: ("query-id", "corpus-id", "score"), read, (path,))
