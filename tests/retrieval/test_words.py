"""Words of texts in many scripts, by hand."""

import random
import string

import pytest

from ragjax.retrieval.words import words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" ?! \n", []),
        ("The Battle of Hastings (1066)", ["the", "battle", "of", "hastings", "1066"]),
        ("don't snake_case x-ray", ["don", "t", "snake", "case", "x", "ray"]),
        ("Zürich, Malmö and naïve Łódź", ["zurich", "malmo", "and", "naive", "łodz"]),
        ("STRASSE Straße ﬁne", ["strasse", "strasse", "fine"]),
        ("Ελλάδα Москва ёлка", ["ελλαδα", "москва", "елка"]),
        ("ＡＢＣ１２３", ["abc123"]),  # full width
        ("한국어 단어", ["한국어", "단어"]),  # Hangul has spaces
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowels are marks, and stay
        ("北京是首都", ["北京", "京是", "是首", "首都"]),
        ("東 京都。カタカナ", ["東", "京都", "カタ", "タカ", "カナ"]),
        ("がく", ["がく"]),  # its first letter may also come as two characters
        ("ภาษาa1", ["ภา", "าษ", "ษา", "a1"]),
        ("2024年の夏", ["2024", "年の", "の夏"]),
    ],
)
def test_words(text, words):
    assert words_of(text) == words


def test_two_spellings_of_one_text_have_the_same_words():
    for composed, decomposed in (("Zürich", "Zu\u0308rich"), ("がく", "か\u3099く"), ("한국", "\u1112\u1161\u11ab국")):
        assert words_of(composed) == words_of(decomposed) == words_of(composed.upper())


def test_the_short_way_of_plain_ascii_gives_what_the_long_one_gives():
    """A text with one character beyond ASCII at its end goes the long way."""
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices(string.printable, k=40))
        assert words_of(text + " é") == [*words_of(text), "e"]
