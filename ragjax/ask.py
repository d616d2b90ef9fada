"""Answers questions from a trained run, and shows the passages that the answers rest on.

    python -m ragjax.ask --run_dir=runs/joint "What is the capital of France?"
    python -m ragjax.ask --run_dir=runs/joint                    # asks for questions; end with Ctrl-D
    python -m ragjax.ask --run_dir=runs/joint --json < questions.txt

Prints the answer with its probability p(y|x), and of each passage p(z|x), how likely the embedder thinks that it helps,
and p(z|x,y), how much of the answer's probability comes from it.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from absl import flags as absl_flags

from ragjax import flags
from ragjax.config import DecodeConfig
from ragjax.errors import UserError

if TYPE_CHECKING:
    from ragjax.pipeline import Answer

_RUN_DIR = absl_flags.DEFINE_string("run_dir", "runs/joint", "Folder of a ragjax.train run.")
_TOP_K = absl_flags.DEFINE_integer("top_k", 0, "Passages to read; 0: as many as the run.", lower_bound=0)
_JSON = absl_flags.DEFINE_bool("json", False, "One JSON object a line for each question, and nothing else.")
flags.define_overrides(DecodeConfig)

_BOLD, _PLAIN = "\033[1m", "\033[0m"


def main(arguments: Sequence[str]) -> None:
    import dataclasses

    from ragjax.generation import check_decoding
    from ragjax.pipeline import ask, open_run

    question = _checked(" ".join(arguments).strip())
    if arguments and not question:
        raise UserError(_NOTHING_ASKED)
    run = open_run(_RUN_DIR.value)
    config = dataclasses.replace(run.config, top_k=_TOP_K.value or run.config.top_k, **flags.given(DecodeConfig))
    check_decoding(config)
    run.pipeline.check_top_k(config.top_k)
    if sentence := run.unfinished():
        print(sentence, file=sys.stderr)
    is_terminal = sys.stdout.isatty() and not _JSON.value

    def answer(question: str) -> None:
        found = ask(run, _checked(question), config, _Stream() if is_terminal else None)
        if _JSON.value:
            print(_json_line(question, found), flush=True)
        else:
            _print(found, is_terminal)

    if question:
        answer(question)
        return
    is_prompted, asked, failed = sys.stdin.isatty(), 0, 0
    for line in _questions():
        asked += 1
        try:
            answer(line)
        except UserError as error:  # of this question; the next one can be asked
            failed += 1
            if _JSON.value:
                print(json.dumps({"question": line, "error": str(error)}), flush=True)
            else:
                print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if not is_prompted:
                raise
            print(file=sys.stderr)  # this question is dropped
    if is_prompted:
        return
    if not asked:
        raise UserError(_NOTHING_ASKED)
    if failed:
        raise UserError(f"{failed} of {asked} questions could not be answered: see the errors above.")


_NOTHING_ASKED = 'Ask something: python -m ragjax.ask --run_dir=FOLDER "your question".'


def _checked(question: str) -> str:
    """The question. Raises UserError where its bytes were no UTF-8."""
    try:
        question.encode()
    except UnicodeEncodeError:
        raise UserError(f"the question {ascii(question[:60])} is not UTF-8 text: convert it.") from None
    return question


def _questions() -> Iterator[str]:
    """Lines of standard input; at a terminal with a prompt, and with the history of earlier times."""
    sys.stdin.reconfigure(errors="surrogateescape")  # for `_checked` to refuse
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    with _history():
        while True:
            try:
                line = _prompted("question> ").strip()
            except KeyboardInterrupt:  # a new line instead of this one
                print(file=sys.stderr)
                continue
            except EOFError:
                print(file=sys.stderr)
                return
            if line:
                yield line


def _prompted(prompt: str) -> str:
    """A line typed at the terminal."""
    if sys.stdout.isatty():
        return input(prompt)
    # `input` would write the prompt among the answers.
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


@contextlib.contextmanager
def _history() -> Iterator[None]:
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


class _Stream:
    """Writes what is new in a growing text."""

    def __init__(self):
        self._shown = ""

    def __call__(self, text: str) -> None:
        if not text.startswith(self._shown):  # a character that was not whole has changed
            sys.stdout.write("\r" + " " * len(self._shown) + "\r")
            self._shown = ""
        sys.stdout.write(text[len(self._shown) :])
        sys.stdout.flush()
        self._shown = text


def _print(answer: "Answer", is_terminal: bool) -> None:
    # The terminal has seen the text already.
    shown = "" if is_terminal else f"\n{answer.text}"
    print(f"{shown}  (probability {answer.probability:.3f})\n")
    rows = zip(answer.passages, answer.probabilities, answer.posterior, strict=True)
    for rank, (passage, share, after) in enumerate(rows, start=1):
        text = passage.prompt_text
        if is_terminal and "NO_COLOR" not in os.environ:
            text = _highlight(text, answer.text)
        print(f"{rank}. p(z|x) = {share:.3f}  p(z|x,y) = {after:.3f}  [{passage.id}]  {text}")
    print(flush=True)


def _highlight(text: str, answer: str) -> str:
    """The answer in bold wherever the text has it, in any case."""
    import re

    return re.sub(re.escape(answer), lambda match: f"{_BOLD}{match[0]}{_PLAIN}", text, flags=re.I) if answer else text


def _json_line(question: str, answer: "Answer") -> str:
    rows = zip(answer.passages, answer.probabilities.tolist(), answer.posterior.tolist(), strict=True)
    passages = [
        {"id": passage.id, "title": passage.title, "text": passage.text, "probability": share, "posterior": after}
        for passage, share, after in rows
    ]
    record = {"question": question, "answer": answer.text, "probability": answer.probability, "passages": passages}
    return json.dumps(record, ensure_ascii=False)


if __name__ == "__main__":
    flags.run_command(main, goes_on=False)
