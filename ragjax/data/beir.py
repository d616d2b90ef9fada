"""Data sets in BEIR's layout (Thakur et al. 2021): queries, and which passages answer them, without answers.

corpus.jsonl      {"_id", "title", "text"}    read as any other corpus
queries.jsonl     {"_id", "text"}
qrels/SPLIT.tsv   query-id, corpus-id and score, under a header; a score above 0 marks a positive
"""

from collections.abc import Collection, Container, Iterator
from pathlib import Path

from ragjax.data.lines import Line, raw_lines, read_records
from ragjax.data.questions import Question, check_positive
from ragjax.errors import UserError


def read_queries(path: str | Path) -> list[Question]:
    """The queries of a file, in file order, as questions without answers and positives.

    Raises UserError for an unreadable file, a bad line, or an id that occurs twice.
    """

    def parse(line: Line) -> Question:
        return Question(line.identity(), line.text("text"), (), ())

    return read_records(path, parse)


def read_qrels(path: str | Path, queries: Collection[Question], passage_ids: Container[str]) -> list[Question]:
    """The queries that a file of judgements names, in the order of `queries`, each with its positives.

    Raises UserError, naming file and line, for a line that is not of three columns, and for a query or a passage that
    is not there.
    """
    known = {query.id for query in queries}
    positives: dict[str, dict[str, None]] = {}  # as an ordered set
    for number, (query, passage, score) in _judgements(path):

        def error(fault: str, mend: str, number: int = number) -> UserError:
            return UserError(f"{path}, line {number}: {fault}; {mend}")

        if query not in known:
            raise error(f'the query id "{query}" is not among the queries', "add that query or remove the line")
        found = positives.setdefault(query, {})
        if score > 0:
            check_positive(passage, passage_ids, error)
            found[passage] = None
    return [
        Question(query.id, query.question, (), tuple(positives[query.id])) for query in queries if query.id in positives
    ]


def _judgements(path: str | Path) -> Iterator[tuple[int, tuple[str, str, float]]]:
    """(line number, (query id, passage id, score)) of each line but the header."""
    for number, data in raw_lines(path):
        try:
            columns = data.decode("utf-8-sig" if number == 1 else "utf-8").strip().split("\t")
            if columns == [""]:
                continue
            query, passage, score = columns
            if number == 1 and score == "score":
                continue
            yield number, (query, passage, float(score))
        except ValueError:  # also bytes that are no text
            fault = f"{path}, line {number}: not a query's id, a passage's id and a number"
            raise UserError(f"{fault}; write these three with tabs between them") from None
