"""Another library's error inside a sentence of ours."""

from ragjax.errors import reason


def test_a_reason_is_the_first_sentence_or_the_class():
    assert reason(OSError("no space left. Free some.")) == "no space left"
    assert reason(ValueError("cannot be read:\n  line 3")) == "cannot be read"
    assert reason(KeyError()) == "KeyError"


def test_a_long_reason_is_cut():
    assert reason(ValueError("a" * 200)) == "a" * 200
    assert reason(ValueError("a" * 201)) == "a" * 197 + "..."
