"""Questions and answers at a terminal or in a pipe: the prompt with its history, streaming, what is printed.

Imports nothing that takes time to load, so that a command can refuse bad flags at once.
"""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

from ragjax.errors import UserError
from ragjax.voice import say

if TYPE_CHECKING:
    from ragjax.runs import Answer

_BOLD, _PLAIN = "\033[1m", "\033[0m"
NOTHING_ASKED = 'Ask something: python -m ragjax.ask --run_dir=FOLDER "your question".'

# What a terminal obeys instead of showing it, line breaks and tabs apart: control characters, the start of escape
# sequences among them, and those that turn the direction of writing.
_OBEYED = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_SHOWN = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _OBEYED if chr(code) not in "\n\t"}
_SHOWN_IN_JSON = {code: f"\\u{code:04x}" for code in _OBEYED}


def visible(text: str) -> str:
    """The text with control characters spelled out: passages come from anywhere."""
    return text.translate(_SHOWN)


def checked(question: str) -> str:
    """The question. Raises UserError where its bytes were no UTF-8."""
    try:
        question.encode()
    except UnicodeEncodeError:
        raise UserError(f"the question {ascii(question[:60])} is not UTF-8 text: convert it.") from None
    return question


def answer_lines(answer: Callable[[str], None], as_json: bool) -> None:
    """Calls `answer` for the question of every line of standard input; one that fails leaves the others their answers.

    as_json: a line may also be a JSON object with "question", as in a data folder, and errors are JSON too. Raises
    UserError at the end where input that was not typed held no question, or one that failed.
    """
    is_prompted, asked, failed = sys.stdin.isatty(), 0, 0
    for line in _questions():
        asked += 1
        try:
            answer(_question_of(line) if as_json else line)
        except UserError as error:  # of this question; the next one can be asked
            failed += 1
            if as_json:
                say(json.dumps({"question": line, "error": str(error)}), flush=True)
            else:
                say(f"error: {visible(str(error))}", to_stderr=True)
        except KeyboardInterrupt:
            if not is_prompted:
                raise
            say(to_stderr=True)  # this question is dropped
    if is_prompted:
        return
    if not asked:
        raise UserError(NOTHING_ASKED)
    if failed:
        raise UserError(f"{failed} of {asked} questions could not be answered: see the errors above.")


def _question_of(line: str) -> str:
    """The question in a line. Raises UserError where that is JSON without one."""
    if not line.startswith("{"):
        return line
    try:
        question = json.loads(line)["question"]
    except (ValueError, KeyError, RecursionError):
        question = None
    if not isinstance(question, str) or not question.strip():
        raise UserError('the line is no JSON object with a "question" that is text: write one, or plain text.')
    return question.strip()


def _questions() -> Iterator[str]:
    """Lines of standard input; at a terminal with a prompt, and with the history of earlier times."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # for `checked` to refuse
    if not sys.stdin.isatty():
        for number, line in enumerate(sys.stdin):
            # Windows writes a mark before the first line; with LANG=C its bytes are no text yet.
            line = _without_mark(line) if number == 0 else line
            if line.strip():
                yield line.strip()
        return
    with _history():
        while True:
            try:
                line = _prompted("question> ").strip()
            except KeyboardInterrupt:  # a new line instead of this one
                say(to_stderr=True)
                continue
            except EOFError:
                say(to_stderr=True)
                return
            if line:
                yield line


def _without_mark(line: str) -> str:
    return line.removeprefix("\ufeff").removeprefix("\udcef\udcbb\udcbf")


def _prompted(prompt: str) -> str:
    """A line typed at the terminal."""
    if sys.stdout.isatty():
        return input(prompt)
    # `input` would write the prompt among the answers.
    say(prompt, end="", to_stderr=True, flush=True)
    return input()


@contextlib.contextmanager
def _history() -> Generator[None, None, None]:
    """Arrow keys bring back the questions of this and earlier times, where Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    from ragjax.files import default_cache_dir

    path = default_cache_dir() / "ask_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)


class Stream:
    """Writes what is new in a growing text."""

    def __init__(self):
        self._shown = ""

    def __call__(self, text: str) -> None:
        text = visible(text)
        if not text.startswith(self._shown):  # a character that was not whole has changed
            say("\r" + " " * len(self._shown) + "\r", end="")
            self._shown = ""
        say(text[len(self._shown) :], end="", flush=True)
        self._shown = text


def print_answer(answer: "Answer", is_streamed: bool) -> None:
    """An answer and its passages; a terminal that a `Stream` wrote to has seen the text already."""
    shown = "" if is_streamed else f"\n{visible(answer.text)}"
    say(f"{shown}  (probability {answer.probability:.3f})\n")
    rows = zip(answer.passages, answer.probabilities, answer.posterior, strict=True)
    for rank, (passage, share, after) in enumerate(rows, start=1):
        text = visible(passage.prompt_text)
        if is_streamed and "NO_COLOR" not in os.environ:
            text = _highlight(text, visible(answer.text))
        say(f"{rank}. p(z|x) = {share:.3f}  p(z|x,y) = {after:.3f}  [{visible(passage.id)}]  {text}")
    say(flush=True)


def _highlight(text: str, answer: str) -> str:
    """The answer in bold wherever the text has it, in any case."""
    return re.sub(re.escape(answer), lambda match: f"{_BOLD}{match[0]}{_PLAIN}", text, flags=re.I) if answer else text


def json_line(question: str, answer: "Answer") -> str:
    """An answer and its passages as one JSON object."""
    rows = zip(answer.passages, answer.probabilities.tolist(), answer.posterior.tolist(), strict=True)
    passages = [
        {"id": passage.id, "title": passage.title, "text": passage.text, "probability": share, "posterior": after}
        for passage, share, after in rows
    ]
    record = {"question": question, "answer": answer.text, "probability": answer.probability, "passages": passages}
    # These stand inside strings only, where JSON has the same escapes.
    return json.dumps(record, ensure_ascii=False).translate(_SHOWN_IN_JSON)
