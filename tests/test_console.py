"""What ragjax.ask prints of texts that come from anywhere: no terminal obeys them."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest

from ragjax.commands import console
from ragjax.data.questions import Passage

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
