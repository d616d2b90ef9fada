"""What ragjax.ask prints of texts that come from anywhere: no terminal obeys them."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest

from ragjax.commands import console
from ragjax.data.questions import Passage
from ragjax.errors import UserError

# Clears the screen, sets the title, turns the direction of writing, rubs out, starts a sequence in one character.
HOSTILE = "\x1b[2J\x1b]0;title\x07 \u202e \u2066 \x08\x7f\r \x9b31m \x00 end"
SHOWN = r"\x1b[2J\x1b]0;title\x07 \u202e \u2066 \x08\x7f\x0d \x9b31m \x00 end"


def obeyed(text: str) -> set[str]:
    return {c for c in text if c not in "\n\t" and (ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u202e\u2066")}


def answer(text=HOSTILE):
    passages = [Passage(HOSTILE, HOSTILE, f"before {HOSTILE} behind"), Passage("p2", "", "Łódź 🗼\tnext\nline")]
    return SimpleNamespace(
        text=text, probability=0.5, passages=passages, probabilities=np.full(2, 0.5), posterior=np.full(2, 0.5)
    )


def test_control_characters_are_spelled_out():
    assert console.visible(HOSTILE) == SHOWN
    assert console.visible("Łódź 🗼\tnext\nline") == "Łódź 🗼\tnext\nline"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_and_its_passages_are_shown_and_not_obeyed(capsys, monkeypatch, is_streamed):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if is_streamed:
        stream = console.Stream()
        stream(HOSTILE[:3])
        stream(HOSTILE)
    console.print_answer(answer(), is_streamed)
    out = capsys.readouterr().out
    assert out.count(SHOWN) == 4  # the answer; the passage's id, title and text
    assert "Łódź 🗼\tnext\nline" in out
    own = out.replace("\033[1m", "").replace("\033[0m", "")  # what is bold is ragjax's own
    assert (own != out) == is_streamed
    assert not obeyed(own)


def test_json_has_no_control_characters_and_keeps_the_text():
    line = console.json_line(HOSTILE, answer())
    assert not obeyed(line)
    assert json.loads(line)["answer"] == HOSTILE
    assert json.loads(line)["passages"][0]["id"] == HOSTILE


def test_an_error_is_shown_and_not_obeyed(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr(console, "_questions", lambda: iter(["why?"]))

    def fail(question):
        raise console.UserError(HOSTILE)

    with pytest.raises(console.UserError, match="1 of 1 questions"):
        console.answer_lines(fail, as_json=False)
    assert capsys.readouterr().err == f"error: {SHOWN}\n"


def asked(monkeypatch, content: bytes, as_json: bool, encoding="utf-8", errors="strict") -> list[str]:
    """The questions that standard input holds."""
    stream = io.TextIOWrapper(io.BytesIO(content), encoding=encoding, errors=errors)
    monkeypatch.setattr("sys.stdin", stream)
    found = []
    console.answer_lines(found.append, as_json)
    return found


@pytest.mark.parametrize(("encoding", "errors"), [("utf-8", "strict"), ("ascii", "surrogateescape")])
def test_lines_of_a_file_from_windows_are_questions(monkeypatch, encoding, errors):
    content = b"\xef\xbb\xbfWhy?\r\n\r\n  \r\nHow so?\r\nWho?"
    assert asked(monkeypatch, content, False, encoding, errors) == ["Why?", "How so?", "Who?"]


def test_json_lines_may_stand_among_plain_ones(monkeypatch):
    record = json.dumps({"id": "q1", "question": " Which {town}? ", "answers": ["A"]})
    content = f"\ufeff{record}\r\nWhy?\n\n".encode()
    assert asked(monkeypatch, content, True) == ["Which {town}?", "Why?"]
    assert asked(monkeypatch, b'{"question": "Why?"}', False) == ['{"question": "Why?"}']  # without --json: text


@pytest.mark.parametrize("line", ['{"id": "q1"}', '{"question": null}', '{"question": " "}', '{"question":'])
def test_json_without_a_question_is_refused_by_itself(monkeypatch, capsys, line):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{line}\nWhy?\n".encode()), encoding="utf-8"))
    found = []
    with pytest.raises(UserError, match="1 of 2 questions could not be answered"):
        console.answer_lines(found.append, as_json=True)
    assert found == ["Why?"]
    (said,) = capsys.readouterr().out.splitlines()
    assert json.loads(said)["question"] == line
    assert 'no JSON object with a "question"' in json.loads(said)["error"]
