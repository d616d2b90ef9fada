"""Documents into passages: the same passages each time, each with the place where it begins.

paragraphs   the largest run of whole paragraphs, else sentences, else words that is no longer than `size` characters
             (1,000 with an overlap of 200: MedRAG's recipe, Xiong et al. 2024, there without sentences)
tokens       the same by the tokens of a model
words        runs of `size` words, apart from each other (100: Karpukhin et al. 2020, section 4.1)

A chunk is a slice of its document, so its place and its length lead back to it; white space at its ends is left out.
"""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ragjax.errors import UserError

CHUNKERS = ("paragraphs", "words", "tokens")
# (size, overlap), in characters, words and tokens.
RECIPES = {"paragraphs": (1000, 200), "words": (100, 0), "tokens": (256, 0)}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a text: text[start : start + len(chunk.text)]."""

    text: str
    start: int


Chunker = Callable[[str], Iterator[Chunk]]


def make_chunker(how: str, size: int, overlap: int, count_tokens: Callable[[str], int] | None = None) -> Chunker:
    """What splits a text. A text of white space alone has no chunks.

    Args:
      how: one of CHUNKERS.
      size: of a chunk at most, in characters, words or tokens; a single character may be more tokens than that.
      overlap: how much of a chunk may stand in the next one too, in the same unit; less than `size`.
      count_tokens: for tokens alone: how many a text is, without special ones.

    Raises:
      UserError: an overlap that is not smaller than the size.
    """
    if not 0 <= overlap < size:
        raise UserError(f"--chunk_overlap={overlap} has to be smaller than --chunk_size={size}: lower it or raise that")
    if how == "words":
        return functools.partial(_word_runs, size=size, overlap=overlap)
    from semantic_text_splitter import TextSplitter

    if count_tokens is None:
        return functools.partial(_split, TextSplitter(size, overlap))
    return functools.partial(_split, TextSplitter.from_callback(count_tokens, size, overlap))


def _split(splitter: Any, text: str) -> Iterator[Chunk]:
    for start, chunk in splitter.chunk_indices(text):
        yield Chunk(chunk, start)


def _word_runs(text: str, size: int, overlap: int) -> Iterator[Chunk]:
    words = [match.span() for match in re.finditer(r"\S+", text)]
    for first in range(0, len(words), size - overlap):
        run = words[first : first + size]
        yield Chunk(text[run[0][0] : run[-1][1]], run[0][0])
        if first + size >= len(words):  # what follows would be the end of this one
            return
