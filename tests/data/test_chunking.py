"""Chunks by hand, and what holds for every text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragjax.data.chunking import CHUNKERS, RECIPES, Chunk, make_chunker
from ragjax.errors import UserError

TEXT = "One fish. Two fish.\n\nRed fish swim. Blue fish rest. 日本語のテキスト。もう一つ。"


def chunks(how, size, overlap, text=TEXT):
    return list(make_chunker(how, size, overlap, len_of_words if how == "tokens" else None)(text))


def len_of_words(text):
    return len(text.split())


def test_paragraphs_then_sentences_then_words():
    assert chunks("paragraphs", 60, 0) == [
        Chunk("One fish. Two fish.", 0),
        Chunk("Red fish swim. Blue fish rest. 日本語のテキスト。もう一つ。", 21),
    ]
    assert [chunk.text for chunk in chunks("paragraphs", 16, 0)][:4] == [
        "One fish.",
        "Two fish.",
        "Red fish swim.",
        "Blue fish rest.",
    ]
    assert [chunk.text for chunk in chunks("paragraphs", 8, 0)][:2] == ["One fish", "."]


def test_an_overlap_repeats_whole_sentences():
    text = "Aa bb cc. Dd ee ff. Gg hh ii. Jj kk ll."
    assert [chunk.text for chunk in chunks("paragraphs", 20, 10, text)] == [
        "Aa bb cc. Dd ee ff.",
        "Dd ee ff. Gg hh ii.",
        "Gg hh ii. Jj kk ll.",
    ]


def test_words_are_apart_unless_asked():
    text = " a b\tc  d\ne f g "
    assert chunks("words", 3, 0, text) == [Chunk("a b\tc", 1), Chunk("d\ne f", 8), Chunk("g", 14)]
    assert [chunk.text.split() for chunk in chunks("words", 3, 1, text)] == [list("abc"), list("cde"), list("efg")]


def test_tokens_are_counted_by_the_caller():
    text = "a b c. d e f. g h i."
    assert [chunk.text for chunk in chunks("tokens", 6, 0, text)] == ["a b c. d e f.", "g h i."]


@pytest.mark.parametrize("how", CHUNKERS)
@given(
    text=st.text(alphabet=st.sampled_from("ab. \n\u2028é日。😀\u0301\r"), max_size=120),
    size=st.integers(2, 12),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_chunks_are_slices_that_leave_out_white_space_alone(how, text, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    found = chunks(how, size, overlap, text)
    assert found == chunks(how, size, overlap, text)
    covered = set()
    for chunk in found:
        end = chunk.start + len(chunk.text)
        assert text[chunk.start : end] == chunk.text and chunk.text.strip()
        covered |= set(range(chunk.start, end))
        measure = len if how == "paragraphs" else len_of_words
        assert measure(chunk.text) <= size or len(chunk.text) <= 3  # a character with its accents is not divided
    assert [chunk.start for chunk in found] == sorted(chunk.start for chunk in found)
    assert not "".join(character for place, character in enumerate(text) if place not in covered).strip()


def test_bad_sizes():
    for size, overlap in ((100, 100), (0, 0), (5, -1)):
        with pytest.raises(UserError, match=f"--chunk_overlap={overlap} has to be smaller than --chunk_size={size}"):
            make_chunker("words", size, overlap)
    for how, (size, overlap) in RECIPES.items():
        assert chunks(how, size, overlap, "One.") == [Chunk("One.", 0)]
