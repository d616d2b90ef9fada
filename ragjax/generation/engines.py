"""Where prompts are read and answers searched for: on one set of weights, or on a copy of them on every device.

`decode.py` hands over arrays of as many questions as an engine takes at once; which device has which of them is known
here alone.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt32

from ragjax.arrays import AnyArray, Array, Variables
from ragjax.generation import beam_search
from ragjax.generation.beam_search import Rule
from ragjax.models.decoder import Decoder
from ragjax.parallel import Arrangement, to_host

# A decoder with its variables.
Bound = tuple[Decoder, Variables]


class Ended(NamedTuple):
    """Answers of B questions on the host, best first."""

    tokens: Int[np.ndarray, "B Q T"]  # without the end token
    lengths: Int[np.ndarray, "B Q"]
    scores: Float32[np.ndarray, "B Q"]  # log-probabilities, -inf: no answer


@runtime_checkable
class Engine(Protocol):
    """What decoding computes. Arrays are given and returned with all questions on their first axis."""

    @property
    def copies(self) -> int:
        """By which the number of questions that are decoded at once has to be divisible."""

    def read(self, tokens: Int[np.ndarray, "R S"], lengths: Int[np.ndarray, " R"]) -> Any:
        """Prompts that are read, for the two others."""

    def search(
        self,
        read: Any,
        log_weights: Float32[np.ndarray, "B K"],
        is_asked: Bool[np.ndarray, " B"],
        seeds: UInt32[np.ndarray, " B"],
        rule: Rule,
    ) -> Ended:
        """The answers under R = B * K prompts, as `beam_search.begin` and `advance` find them."""

    def score(
        self, read: Any, tokens: Int[np.ndarray, "B U T"], lengths: Int[np.ndarray, "B U"]
    ) -> Float32[np.ndarray, "B K U"]:
        """`beam_search.score_continuations`."""


class OneCopy(NamedTuple):
    """On the weights where they lie, on one device or on many."""

    reader: Bound
    steps: Bound  # for what follows the prompts

    copies = 1

    def read(self, tokens: AnyArray, lengths: AnyArray) -> Any:
        return _read(*self.reader, (tokens, lengths), self.steps[0].config.decoding_layout)

    def search(self, read: Any, log_weights: AnyArray, is_asked: AnyArray, seeds: AnyArray, rule: Rule) -> Ended:
        return Ended(*to_host(_search(*self.steps, (read, log_weights, is_asked, seeds), rule)))

    def score(self, read: Any, tokens: AnyArray, lengths: AnyArray) -> np.ndarray:
        return to_host(_score(*self.steps, (read, tokens, lengths)))


class Copies(NamedTuple):
    """On all devices, each of which has all weights and an equal share of the questions."""

    reader: Bound  # variables are placed
    steps: Bound
    arrangement: Arrangement

    @property
    def copies(self) -> int:
        return self.arrangement.copies

    def read(self, tokens: AnyArray, lengths: AnyArray) -> Any:
        (module, variables), is_unstacked = self.reader, self.steps[0].config.decoding_layout
        mapped = _mapped_read(self.arrangement, module, is_unstacked)  # ty: ignore[invalid-argument-type]
        return mapped(variables, self._shared((tokens, lengths)))

    def search(self, read: Any, log_weights: AnyArray, is_asked: AnyArray, seeds: AnyArray, rule: Rule) -> Ended:
        module, variables = self.steps
        mapped = _mapped_search(self.arrangement, module, rule)  # ty: ignore[invalid-argument-type]
        found = mapped(variables, (read, *self._shared((log_weights, is_asked, seeds))))
        return Ended(*map(_joined, to_host(found)))

    def score(self, read: Any, tokens: AnyArray, lengths: AnyArray) -> np.ndarray:
        module, variables = self.steps
        mapped = _mapped_score(self.arrangement, module)  # ty: ignore[invalid-argument-type]
        return _joined(to_host(mapped(variables, (read, *self._shared((tokens, lengths))))))

    def _shared(self, arrays: tuple[AnyArray, ...]) -> tuple[AnyArray, ...]:
        """With an axis of copies in front."""
        return tuple(each.reshape(self.copies, -1, *each.shape[1:]) for each in arrays)


def _joined(shared: np.ndarray) -> np.ndarray:
    return shared.reshape(-1, *shared.shape[2:])


def engine_of(reader: Bound, steps: Bound, arrangement: Arrangement) -> Engine:
    """What decodes fastest with the devices arranged like that."""
    if arrangement.copies == 1:
        return OneCopy(reader, steps)
    (module, variables), (step_module, step_variables) = reader, steps
    placed = arrangement.place(variables)
    placed_steps = placed if step_variables is variables else arrangement.place(step_variables)
    return Copies((module, placed), (step_module, placed_steps), arrangement)


# ---- of one copy; what is mapped over copies takes one argument beside the variables ---------------------------


def _read(module: Decoder, variables: Variables, prompts: Any, is_unstacked: bool) -> Any:
    return beam_search.prefill(module, variables, *prompts, is_unstacked)


def _search(module: Decoder, variables: Variables, asked: Any, rule: Rule) -> tuple[Array, Array, Array]:
    (last, prompts), log_weights, is_asked, seeds = asked
    state = beam_search.begin(module, variables, last, log_weights, is_asked, seeds, rule)
    until = rule.max_new_tokens + 1
    state = beam_search.advance(module, variables, prompts, log_weights, seeds, state, until, rule)
    return state.ended_tokens, state.ended_lengths, state.ended_scores


def _score(module: Decoder, variables: Variables, asked: Any) -> Array:
    (last, prompts), tokens, lengths = asked
    return beam_search.score_continuations(module, variables, last, prompts, tokens, lengths)


# A program for each module, whatever its variables.


@functools.cache
def _mapped_read(arrangement: Arrangement, module: Decoder, is_unstacked: bool) -> Callable[[Variables, Any], Any]:
    return arrangement.compile_map(lambda variables, prompts: _read(module, variables, prompts, is_unstacked))


@functools.cache
def _mapped_search(arrangement: Arrangement, module: Decoder, rule: Rule) -> Callable[[Variables, Any], Any]:
    return arrangement.compile_map(lambda variables, asked: _search(module, variables, asked, rule))


@functools.cache
def _mapped_score(arrangement: Arrangement, module: Decoder) -> Callable[[Variables, Any], Any]:
    return arrangement.compile_map(lambda variables, asked: _score(module, variables, asked))
