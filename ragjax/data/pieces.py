"""Pieces of a text as the token ids that they have inside the whole.

A piece follows a line break. Encoded by itself, it may get other ids than it has there:

    byte-level BPE (GPT-2, Llama 3)   none, but where a line break joins the punctuation before it (Llama 3's ".\n\n")
    BPE of LLaMA-2 and Mistral        a "▁" before every text that it is given, as if a blank stood there
    SentencePiece's Unigram           that "▁" too; a line break is itself a blank and becomes the next word's "▁"

So a piece is encoded after an anchor, whose ids are then dropped. What a tokenizer does is tried out on letters, not
read from its settings, which say the same thing in many ways.
"""

from typing import Any

_LETTER, _NEXT = "a", "b"
_BREAK, BLANK_LINE = "\n", "\n\n"


class Pieces:
    """Encodes pieces for one tokenizer.

    Attributes:
      separator: ids of a blank line between two pieces, the second of which starts with a letter: many tokenizers
        split white space by what follows it.
      end_joins: whether that can become one token with the end of the piece before it.
    """

    def __init__(self, tokenizer: Any):
        """tokenizer: of transformers; it treats special-token strings as plain text."""
        self._tokenizer = tokenizer
        letter, line = self._plain(_LETTER), self._plain(_LETTER + _BREAK)
        both = self._plain(_LETTER + _BREAK + _NEXT)
        self._needs_anchor = both != [*line, *self._plain(_NEXT)]
        # Where a line break goes into the word after it, a piece has it and the text before must not end with it.
        self._break_joins_on = both[: len(line)] != line
        self._anchor = letter if self._break_joins_on else line
        following = self.inner(_NEXT)
        self.separator = self._plain(_LETTER + BLANK_LINE + _NEXT)[len(letter) : -len(following)]
        end = _LETTER + "."
        joined = [*self._plain(end), *self.separator, *following]
        self.end_joins = self._plain(end + BLANK_LINE + _NEXT) != joined

    def first(self, text: str, **settings: Any) -> list[int]:
        """The piece that starts the whole; `settings` go to the tokenizer."""
        return self._plain(self._without_break(text), **settings)

    def inner(self, text: str, **settings: Any) -> list[int]:
        """A piece after a line break; by itself where the tokenizer makes one token of that and the text's start."""
        text = self._without_break(text)
        if not self._needs_anchor:
            return self._plain(text, **settings)
        ids = self._plain(_LETTER + _BREAK + text, **settings)
        start = len(self._anchor)
        return ids[start:] if ids[:start] == self._anchor else self._plain(text, **settings)

    def before_blank_line(self, text: str) -> list[int]:
        """`inner(text)` and the separator, whose line breaks may have become one token with the text's end."""
        if self.end_joins:
            following = self.inner(_NEXT)
            ids = self.inner(text + BLANK_LINE + _NEXT)
            if ids[-len(following) :] == following:
                return ids[: -len(following)]
        return [*self.inner(text), *self.separator]

    def _without_break(self, text: str) -> str:
        return text.rstrip(_BREAK) if self._break_joins_on else text

    def _plain(self, text: str, **settings: Any) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, **settings)["input_ids"]
