"""ragjax.ask at a terminal and in a pipe. What answers is a stand-in; tests/test_commands.py asks real runs."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A shell's background jobs are born with Ctrl-C ignored.
COMMAND = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from types import SimpleNamespace
import numpy as np
from ragjax import runs
from ragjax.commands import ask, flags
from ragjax.config import RunConfig
from ragjax.data.questions import Passage
from ragjax.errors import UserError

def answer(pipeline, question, config, show=None):
    show = show or (lambda text: None)
    if question == "too long":
        raise UserError("shorten it.")
    if question == "slow":
        show("Dun")
        print("waiting", flush=True)
        time.sleep(600)
    for text in ("A", "Ar", "Corvo"):
        show(text)
    return runs.Answer("Corvo", 0.25, [Passage("p7", "Old", "the CORVO of old")], np.ones(1), np.ones(1))

runs.ask = answer
pipeline = SimpleNamespace(check_top_k=lambda k: None)
runs.open_run = lambda folder, data, search: SimpleNamespace(
    config=RunConfig(), unfinished=lambda: None, pipeline=pipeline
)
flags.run_command(ask.main, resumes=False)
"""


def start(folder: Path, *arguments: str, **streams) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment |= {"RAGJAX_CACHE": str(folder), "TERM": "dumb"}
    return subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], env=environment, **streams)


class Terminal:
    """A command whose standard streams, but for those given, are a terminal."""

    def __init__(self, folder: Path, *arguments: str, **streams):
        self._end, inner = pty.openpty()
        self.process = start(folder, *arguments, **{"stdin": inner, "stdout": inner, "stderr": inner} | streams)
        os.close(inner)

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def until(self, text: str) -> str:
        """What is shown up to and with `text`."""
        shown, deadline = "", time.monotonic() + 60
        while not shown.endswith(text):
            assert time.monotonic() < deadline, shown
            if select.select([self._end], [], [], 1.0)[0]:
                shown = (shown + os.read(self._end, 1).decode(errors="replace")).replace("\r\n", "\n")
        return shown

    def interrupt(self) -> None:
        time.sleep(0.5)  # readline misses a signal that comes between its prompt and its waiting
        self.process.send_signal(signal.SIGINT)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self._end)


PROMPT = "question> "


def test_a_terminal_streams_highlights_and_survives(tmp_path):
    """Answers grow in place; an error or Ctrl-C drops one question; Ctrl-D ends; the next time knows the questions."""
    with Terminal(tmp_path) as terminal:
        terminal.until(PROMPT)
        terminal.type("Where is Corvo?\n")
        shown = terminal.until(PROMPT)
        assert "A" + "r" + "\r  \r" + "Corvo  (probability 0.250)\n" in shown
        assert "[p7]  Old: the \033[1mCORVO\033[0m of old\n" in shown
        terminal.type("too long\n")
        assert "error: shorten it.\n" in terminal.until(PROMPT)
        terminal.type("slow\n")
        terminal.until("waiting\n")
        terminal.interrupt()
        assert terminal.until(PROMPT) == f"\n{PROMPT}"
        terminal.interrupt()
        terminal.until(PROMPT)
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    with Terminal(tmp_path) as terminal:
        terminal.until(PROMPT)
        terminal.type("\x10\x10\x10\n")  # three questions back
        assert "Where is Corvo?" in terminal.until("(probability")


def test_answers_that_are_redirected_hold_no_prompt(tmp_path):
    with open(tmp_path / "answers.jsonl", "wb") as file, Terminal(tmp_path, "--json", stdout=file) as terminal:
        terminal.until(PROMPT)
        terminal.type("Where is Corvo?\n")
        terminal.until(PROMPT)
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    (line,) = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert json.loads(line)["answer"] == "Corvo"


def test_questions_that_fail_leave_the_others_their_answers(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(tmp_path, "--json", **pipes)
    out, errors = process.communicate(b"Where?\ntoo long\ncaf\xe9\nWhere then?\n")
    lines = list(map(json.loads, out.splitlines()))
    assert [line.get("answer") for line in lines] == ["Corvo", None, None, "Corvo"]
    assert [line.get("error") for line in lines] == [
        None,
        "shorten it.",
        r"the question 'caf\udce9' is not UTF-8 text: convert it.",
        None,
    ]
    assert errors.decode().endswith("error: 2 of 4 questions could not be answered: see the errors above.\n")
    assert process.returncode == 1


def test_ctrl_c_stops_a_pipe(tmp_path):
    process = start(tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(b"slow\nWhere?\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"waiting\n"
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate()
    assert (process.returncode, out, errors) == (130, b"", b"stopped\n")


@pytest.mark.parametrize(
    ("question", "sentence"), [(b"caf\xe9", b"is not UTF-8 text: convert it."), (b" ", b"Ask some")]
)
def test_a_question_that_is_no_text_is_refused(tmp_path, question, sentence):
    process = start(tmp_path, question, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.startswith(b"error: ") and sentence in errors and errors.count(b"\n") == 1
