"""Answer log-probabilities of (prompt, answer) pairs, forward only, in a few compiled programs."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ragjax.arrays import Ids, Variables
from ragjax.data.batches import Placed, Shape, make_rows, pack, round_up, sequence_lengths, usual_length
from ragjax.parallel import Arrangement, stack_groups, to_host
from ragjax.pretrained import Generator
from ragjax.scoring import score_answers

# Rows that a group scores in one call. With the wider shape for long answers that makes four programs.
ROWS_PER_CALL = (16, 4, 1)


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """What the compiled shapes are made from: they hold for every pair that will be scored."""

    row_length: int  # S
    prompts_per_row: int  # at most
    usual_answer: int  # tokens; longer ones get a program of their own
    longest_answer: int


class _Call(NamedTuple):
    """What is scored at once."""

    groups: list[list[int]]  # pairs of each group
    places: list[list[Placed]]  # of their prompts, among the rows of their group
    shape: Shape  # of each group's rows


class AnswerScorer:
    """Scores pairs with a generator's given variables."""

    def __init__(self, generator: Generator, limits: RowLimits, arrangement: Arrangement):
        self.generator, self._limits = generator, limits
        module = generator.module
        self._score = arrangement.compile_map(lambda variables, rows: score_answers(module, variables, rows)[:, 0])
        self._groups = arrangement.groups

    def score(self, variables: Variables, prompts: Sequence[Ids], answers: Sequence[Ids]) -> list[np.ndarray]:
        """log p(answer token | prompt, earlier answer tokens) of n pairs: n float32 arrays [T_i], end token last.

        variables: the generator's, as the arrangement has placed them.
        """
        values: list[np.ndarray] = [np.empty(0, np.float32)] * len(prompts)
        long = [len(answer) > self._limits.usual_answer for answer in answers]
        for is_long in (False, True):
            chosen = [i for i in range(len(prompts)) if long[i] == is_long]
            for call in self._calls(chosen, prompts, answers, is_long):
                self._run(call, variables, prompts, answers, values)
        return values

    def _calls(
        self, chosen: Sequence[int], prompts: Sequence[Ids], answers: Sequence[Ids], is_long: bool
    ) -> list[_Call]:
        """The chosen pairs, packed into rows, and the rows shared out over calls and groups."""
        limits = self._limits
        lengths = sequence_lengths([[prompts[i]] for i in chosen], [answers[i] for i in chosen])
        rows: list[list[tuple[int, int]]] = []  # (pair, column)
        for i, place in zip(chosen, pack(lengths, limits.row_length), strict=True):
            rows.extend([] for _ in range(place.row + 1 - len(rows)))
            rows[place.row].append((i, place.column))
        answer_length = limits.longest_answer if is_long else limits.usual_answer
        calls, start = [], 0
        while start < len(rows):
            sizes = ROWS_PER_CALL[-1:] if is_long else ROWS_PER_CALL
            size = next((size for size in sizes if size * self._groups <= len(rows) - start), 1)
            end = min(start + size * self._groups, len(rows))
            groups = [rows[first : min(first + size, end)] for first in range(start, end, size)]
            pairs = [[i for row in group for i, _ in row] for group in groups]
            places = [[Placed(n, column) for n, row in enumerate(group) for _, column in row] for group in groups]
            calls.append(_Call(pairs, places, Shape(size, limits.row_length, answer_length)))
            start = end
        return calls

    def _run(
        self,
        call: _Call,
        variables: Variables,
        prompts: Sequence[Ids],
        answers: Sequence[Ids],
        values: list[np.ndarray],
    ) -> None:
        """Scores the pairs of one call and puts their values where they belong."""
        size = call.shape.rows * self._limits.prompts_per_row
        batches = [
            make_rows([[prompts[i]] for i in pairs], [answers[i] for i in pairs], pairs, call.shape, size, places)
            for pairs, places in zip(call.groups, call.places, strict=True)
        ]
        scores = to_host(self._score(variables, stack_groups(dict(enumerate(batches)), self._groups)))
        for pairs, own in zip(call.groups, scores, strict=False):  # groups without pairs stand last
            for i, score in zip(pairs, own, strict=False):  # and so do places without a pair
                values[i] = score[: len(answers[i])]


def row_limits(prompt_lengths: Sequence[int], shortest: int, longest: int, answer_lengths: Sequence[int]) -> RowLimits:
    """Limits for rows that pack well.

    Args:
      prompt_lengths: a sample of the lengths of prompts with their answers.
      shortest: no prompt is shorter.
      longest: no prompt with its answer is longer.
      answer_lengths: of all answers that will be scored.
    """
    smallest_row = round_up(longest, 64)
    # Wide enough that what is left over at the end of a row is little; attention's cost grows with the width.
    row_length = max(smallest_row, min(3 * smallest_row, round_up(4 * int(np.mean(prompt_lengths)), 64)))
    longest_answer = round_up(max(answer_lengths), 8)
    usual = usual_length(answer_lengths)
    return RowLimits(row_length, max(row_length // max(shortest, 1), 1), usual, longest_answer)
