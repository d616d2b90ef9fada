"""Passages and questions, and the reader of their JSON Lines files (.jsonl and .jsonl.gz).

Keys that the schema does not name are ignored.
"""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from ragjax.data.lines import Line, read_records
from ragjax.errors import UserError


@dataclass(frozen=True, slots=True)
class Passage:
    """One passage of a corpus; the title may be empty."""

    id: str
    title: str
    text: str

    @property
    def embedder_text(self) -> str:
        """What the embedder reads: "title. text", or the text alone."""
        return f"{self.title}. {self.text}" if self.title else self.text

    @property
    def prompt_text(self) -> str:
        """What the generator reads: "title: text", or the text alone."""
        return f"{self.title}: {self.text}" if self.title else self.text


@dataclass(frozen=True, slots=True)
class Question:
    """One question. answers[0] is the training target; positive_ids is empty when unlabelled.

    answers is empty where the data have none (BEIR's never have), which serves retrieval alone.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    positive_ids: tuple[str, ...]


def read_corpus(path: str | Path) -> list[Passage]:
    """The passages of a corpus file {"id", "title", "text"}, in file order.

    "title" may be missing, null or empty; where "text" is empty the title is the text. Raises UserError for an
    unreadable file, a bad line, an id that occurs twice, or a file without passages.
    """
    passages = read_records(path, _passage)
    if not passages:
        raise UserError(f"{path} holds no passages: give it at least one line with id, title and text")
    return passages


def read_questions(path: str | Path, passage_ids: Container[str] | None = None) -> list[Question]:
    """The questions of a split file {"id", "question", "answers", "positive_ids"}, in file order; [] for an
    empty file.

    passage_ids: the ids of the corpus, against which positive_ids are checked (None: not checked). A missing
    or null "positive_ids" reads as unlabelled, and a positive named twice counts once. Missing, null and empty
    "answers" are the same, too: whatever needs them asks `check_answers`. Raises UserError for an
    unreadable file, a bad line, an id that occurs twice, or a positive that is not in the corpus.
    """
    return read_records(path, lambda line: _question(line, passage_ids))


def check_answers(questions: Iterable[Question], path: str | Path, flag: str) -> None:
    """Raises UserError, naming the first of them, where questions have no answers, which `flag` needs.

    path: the file that they stand in.
    """
    for question in questions:
        if not question.answers:
            raise UserError(
                f'{path}: the question with the id "{question.id}" has no answers, which {flag} needs: add "answers": '
                "[...] to it (BEIR's layout has no place for them), or choose --decode=none and --strategy=embedder, "
                "which need none"
            )


def missing_positive(positive: str, error: Callable[[str, str], UserError]) -> UserError:
    """What to raise for a positive that the corpus does not have: `error(fault, mend)`."""
    fault = f'the positive id "{positive}" is not in the corpus'
    return error(fault, "add that passage to the corpus or remove the id")


def _passage(line: Line) -> Passage:
    identity, title = line.identity(), line.optional_text("title")
    if title and line.record.get("text") == "":  # as collections of papers have them without an abstract
        return Passage(identity, "", title)
    return Passage(identity, title, line.text("text"))


def _question(line: Line, passage_ids: Container[str] | None) -> Question:
    identity, question = line.identity(), line.text("question")
    answers, positives = line.optional_texts("answers"), line.optional_texts("positive_ids")
    for positive in positives:
        if passage_ids is not None and positive not in passage_ids:
            raise missing_positive(positive, line.error)
    return Question(identity, question, answers, tuple(dict.fromkeys(positives)))
