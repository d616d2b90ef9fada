"""The prompt, from pieces that are tokenised once each and joined as token ids.

    INSTRUCTION

    ### Context:
    {title}: {text}

    {title}: {text}

    ### Question:
    {question}

    ### Answer:
    {answer}<end>

Training under single passages and evaluation under all of them use this one form. Joining ids instead of strings
lets a passage be stored as tokens. The ids equal those of the whole string (see `pieces`), with this exception:
where SmolLM2's tokenizer makes one token of a blank line before a digit, a second or later passage that starts with a
digit keeps the two tokens that stand before a letter.
"""

import dataclasses
import datetime
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ragjax.data.pieces import BLANK_LINE, Pieces
from ragjax.data.questions import Passage
from ragjax.data.token_cache import TokenCache
from ragjax.errors import UserError, reason

INSTRUCTION = (
    "You are a general-knowledge expert. Use the relevant context to answer the question in as few words as possible."
)
_HEAD = f"{INSTRUCTION}\n\n### Context:\n"
_STYLES = ("paper", "chat")
Tokenise = Callable[[str], list[int]]  # a text's token ids
# The day that chat templates are told: a prompt must not depend on when it is made. Llama 3.2's names it, too.
_DAY = datetime.date(2024, 7, 26)
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")


def prompt_text(passages: Sequence[Passage], question: str) -> str:
    """The whole `paper` prompt as one string: what the pieces stand for."""
    return _HEAD + BLANK_LINE.join([*(passage.prompt_text for passage in passages), _question_piece(question)])


def _question_piece(question: str) -> str:
    return f"### Question:\n{question}\n\n### Answer:\n"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as token ids."""

    ids: list[int]
    cut: frozenset[str]  # ids of the passages that it holds shortened


class PromptBuilder:
    """Tokenises the pieces for one tokenizer and joins them.

    Attributes:
      window: the generator's longest sequence, in tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        eos_token_id: int,
        max_passage_tokens: int,
        window: int,
        style: str = "paper",
        vocab_size: int = sys.maxsize,
        stored: Callable[[Tokenise], Tokenise] = lambda tokenise: tokenise,
    ):
        """
        Args:
          tokenizer: a transformers tokenizer that treats special-token strings in text as plain text.
          eos_token_id: the one token that ends an answer.
          max_passage_tokens: a longer passage is cut there.
          window: the generator's longest sequence, in tokens.
          style: "paper", or "chat" to wrap the prompt in the model's chat template.
          vocab_size: the generator's.
          stored: makes a function that remembers what it gave for a text, as `StoredTokens` does.

        Raises:
          UserError: the chat template is missing, fails, or uses a token that the generator has not.
        """
        if style not in _STYLES:
            raise ValueError(f"style is one of {_STYLES}, not {style!r}")
        self._pieces = Pieces(tokenizer)
        self._passage_ids = stored(self._pieces.inner)
        self._ended_ids = stored(self._pieces.before_blank_line) if self._pieces.end_joins else None
        self._eos_token_id = eos_token_id
        self._max_passage_tokens = max_passage_tokens
        self.window = window
        self._tokens = TokenCache()
        self._ended = TokenCache()  # the same with the blank line
        self._too_long: set[str] = set()
        if style == "chat":
            # The template's special tokens are meant as such.
            before, after = _chat_wrapping(tokenizer)
            self._head = self._pieces.first(before + _HEAD, split_special_tokens=False)
            self._tail = self._pieces.inner(after, split_special_tokens=False)
            beyond = [index for index in (*self._head, *self._tail) if index >= vocab_size]
            if beyond:
                raise UserError(
                    f"the generator's chat template uses the token {tokenizer.convert_ids_to_tokens(beyond[0])!r}, id "
                    f"{beyond[0]}, but the model's vocabulary ends at {vocab_size - 1}: choose --prompt=paper"
                )
        else:
            self._head = [*default_prefix(tokenizer), *self._pieces.first(_HEAD)]
            self._tail = []

    def passage(self, passage: Passage) -> list[int]:
        """The passage's tokens, at most `max_passage_tokens`, kept for the next time while there is room."""
        tokens = self._tokens.get(passage.id)
        if tokens is None:
            tokens = self._passage_ids(passage.prompt_text)
            if len(tokens) > self._max_passage_tokens:
                self._too_long.add(passage.id)
                tokens = tokens[: self._max_passage_tokens]
            self._tokens[passage.id] = tokens
        return tokens

    def _ended_passage(self, passage: Passage, tokens: list[int]) -> list[int]:
        """The passage's `tokens` and those of the blank line after it, which a tokenizer may join."""
        ended = self._ended.get(passage.id)
        if ended is None:
            if self._ended_ids is None or passage.id in self._too_long:
                ended = [*tokens, *self._pieces.separator]
            else:
                ended = self._ended_ids(passage.prompt_text)
            self._ended[passage.id] = ended
        return ended

    def prompt(self, passages: Sequence[Passage], question: str, reserve: int) -> Prompt:
        """The prompt for passages in descending score.

        Args:
          passages: one for training under single passages, all of them for a concatenated prompt.
          question: the question's text, never cut.
          reserve: tokens to leave free in the model's window for the answer. Passages that do not fit the rest are
            cut evenly.

        Raises:
          UserError: question and answer alone are too long for the window.
        """
        pieces = [self.passage(passage) for passage in passages]
        cut = self._too_long.intersection(passage.id for passage in passages)
        room = self.room(question, len(pieces), reserve)
        if sum(map(len, pieces)) > room:
            share = room // len(pieces)
            cut.update(p.id for p, piece in zip(passages, pieces, strict=True) if len(piece) > share)
            ended = [
                self._ended_passage(p, piece) if len(piece) <= share else [*piece[:share], *self._pieces.separator]
                for p, piece in zip(passages, pieces, strict=True)
            ]
        else:
            ended = [self._ended_passage(p, piece) for p, piece in zip(passages, pieces, strict=True)]
        ids = [*self._head, *itertools.chain(*ended), *self._pieces.inner(_question_piece(question)), *self._tail]
        return Prompt(ids, frozenset(cut))

    def room(self, question: str, passages: int, reserve: int) -> int:
        """Tokens that the window leaves for the passages. Raises UserError where there is none for the question."""
        room = self.window - reserve - self.frame_length(question, passages)
        if room < 0:
            shown = question if len(question) <= 60 else f"{question[:60]}..."
            raise UserError(
                f'the question "{shown}", its instruction and an answer of up to {reserve} tokens are {-room} tokens '
                f"longer than the generator's window of {self.window}: shorten the question or the answer "
                "(--max_new_tokens)."
            )
        return room

    def answer(self, answer: str) -> list[int]:
        """The answer's tokens, exactly as given, then the end token."""
        return [*self._pieces.inner(answer), self._eos_token_id]

    def frame_length(self, question: str, passages: int) -> int:
        """Tokens of a prompt besides its passages' own, at most: a blank line can join the text before it."""
        tail = len(self._pieces.inner(_question_piece(question))) + len(self._tail)
        return len(self._head) + len(self._pieces.separator) * passages + tail


def _chat_wrapping(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts before and after a user's turn, on one and the same day, without reasoning."""
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    turn = [{"role": "user", "content": mark}]
    if not tokenizer.chat_template:
        raise UserError("the generator has no chat template: choose --prompt=paper, or a chat or instruct model")
    try:
        template = _DATE_CALL.sub(lambda call: repr(_DAY.strftime(call["format"])), tokenizer.get_chat_template())
        # enable_thinking is Qwen3's: an answer here is a few words long.
        text = tokenizer.apply_chat_template(
            turn, chat_template=template, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except Exception as error:  # the template is a program of the model's makers, which may raise anything
        raise UserError(f"the generator's chat template fails ({reason(error)}): choose --prompt=paper") from error
    if "strftime_now(" in template:
        raise UserError(
            "the generator's chat template makes the prompt depend on the day (strftime_now with a format that is not "
            "written out): choose --prompt=paper"
        )
    parts = text.split(mark)
    if len(parts) != 2:
        raise UserError(
            f"the generator's chat template shows a message {len(parts) - 1} times where it should stand once: "
            "choose --prompt=paper"
        )
    return parts[0], parts[1]


def default_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer's default encoding puts before a text: [BOS] or nothing."""
    probe = "a"
    plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    return full[: next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)]
