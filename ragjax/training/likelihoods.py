"""Answer log-probabilities of a frozen generator: each (question, passage) pair is scored once and kept.

While the generator is frozen, log p(y_t | x, z, y_<t) is a constant, so training the embedder needs one forward pass a
pair and no backward pass; later epochs, and other learning rates, find most of their pairs here.

A key is made of what decides the value: the prompt's tokens (so question, passage, template and truncation), the
answer's, and the generator (source, adapters, how it is stored and computed). Values are those of any batch in which
the pair is scored, up to rounding. So that a run which was killed repeats them bit for bit, a batch is kept whole or
not at all, and the file belongs to one run.
"""

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ragjax.costs import Cost, forward_flops
from ragjax.data.batches import Shape, make_rows, pack, round_up, sequence_lengths
from ragjax.files import KeyedRecords
from ragjax.parallel import compile_map, group_count, place, stack_groups
from ragjax.pretrained import Generator
from ragjax.scoring import score_answers

Ids = Sequence[int]

# Rows that a group scores in one call. With the wider shape for long answers that makes four programs.
_ROWS_PER_CALL = (16, 4, 1)


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """What the compiled shapes are made from: they hold for every pair that will be scored."""

    row_length: int  # S
    prompts_per_row: int  # at most
    usual_answer: int  # tokens; longer ones get a program of their own
    longest_answer: int


class Likelihoods:
    """The answer log-probs of one frozen generator."""

    def __init__(self, generator: Generator, limits: RowLimits, path: Path):
        """path: the file they are kept in (.jsonl)."""
        self._generator, self._limits = generator, limits
        self._context = generator.key
        self._records = KeyedRecords(path)
        module = generator.module
        self._score = compile_map(lambda variables, rows: score_answers(module, variables, rows)[:, 0])
        self._variables = place(generator.variables)
        self._groups = group_count()

    def __len__(self) -> int:
        """Pairs that were scored so far, in this process and before."""
        return len(self._records)

    @property
    def position(self) -> int:
        """How much has been kept so far: what `rewind` takes."""
        return self._records.lines

    def rewind(self, position: int) -> None:
        """Forgets what was kept after `position`, so that a run which goes on from there repeats itself."""
        self._records.rewind(position)

    def score(self, prompts: Sequence[Ids], answers: Sequence[Ids]) -> tuple[list[np.ndarray], Cost]:
        """log p(answer token | prompt, earlier answer tokens) of n pairs: n float32 arrays [T_i], end token last.

        Also what the new ones among them have cost.
        """
        began = time.perf_counter()
        keys = [self._key(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        missing = list({key: i for i, key in enumerate(keys) if key not in self._records}.values())
        lengths: list[int] = []
        if missing:
            chosen_prompts, chosen_answers = [prompts[i] for i in missing], [answers[i] for i in missing]
            values = self._score_new(chosen_prompts, chosen_answers)
            self._records.add({keys[i]: value.tolist() for i, value in zip(missing, values, strict=True)})
            lengths = sequence_lengths([[prompt] for prompt in chosen_prompts], chosen_answers)
        found = [np.asarray(self._records[key], np.float32) for key in keys]
        head = sum(len(answers[i]) for i in missing)
        flops = forward_flops(self._generator.size, lengths, head)
        return found, Cost(time.perf_counter() - began, flops, sum(lengths))

    def _key(self, prompt: Ids, answer: Ids) -> str:
        digest = hashlib.sha256(self._context.encode())
        for ids in (prompt, answer):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.asarray(ids, np.int64).tobytes())
        return digest.hexdigest()[:32]

    def _score_new(self, prompts: Sequence[Ids], answers: Sequence[Ids]) -> list[np.ndarray]:
        values: list[np.ndarray] = [np.empty(0, np.float32)] * len(prompts)
        long = [len(answer) > self._limits.usual_answer for answer in answers]
        for is_long in (False, True):
            chosen = [i for i in range(len(prompts)) if long[i] == is_long]
            for pairs, rows in self._calls([prompts[i] for i in chosen], [answers[i] for i in chosen], is_long):
                self._run([chosen[i] for i in pairs], rows, is_long, prompts, answers, values)
        return values

    def _calls(self, prompts: Sequence[Ids], answers: Sequence[Ids], is_long: bool) -> list[tuple[list[int], int]]:
        """Pairs packed into rows, and the rows into calls: (pairs, rows for each group)."""
        lengths = sequence_lengths([[prompt] for prompt in prompts], answers)
        rows: dict[int, list[int]] = {}
        for i, spot in enumerate(pack(lengths, self._limits.row_length)):
            rows.setdefault(spot.row, []).append(i)
        calls, start = [], 0
        while start < len(rows):
            sizes = _ROWS_PER_CALL[-1:] if is_long else _ROWS_PER_CALL
            size = next((size for size in sizes if size * self._groups <= len(rows) - start), 1)
            chosen = range(start, min(start + size * self._groups, len(rows)))
            calls.append(([i for row in chosen for i in rows[row]], size))
            start += size * self._groups
        return calls

    def _run(
        self,
        pairs: Sequence[int],
        rows: int,
        is_long: bool,
        prompts: Sequence[Ids],
        answers: Sequence[Ids],
        values: list[np.ndarray],
    ) -> None:
        """Scores the pairs of one call and puts their values where they belong."""
        limits = self._limits
        shape = Shape(rows, limits.row_length, limits.longest_answer if is_long else limits.usual_answer)
        size = rows * limits.prompts_per_row
        groups = self._share_out(
            pairs, rows, sequence_lengths([[prompts[i]] for i in pairs], [answers[i] for i in pairs])
        )
        batches = [
            make_rows([[prompts[i]] for i in group], [answers[i] for i in group], group, shape, size)
            for group in groups
        ]
        scores = np.asarray(self._score(self._variables, stack_groups(batches, self._groups)))
        for group, own in zip(groups, scores, strict=False):  # groups without pairs stand last
            for i, score in zip(group, own, strict=False):  # and so do places without a pair
                values[i] = score[: len(answers[i])]

    def _share_out(self, pairs: Sequence[int], rows: int, lengths: Sequence[int]) -> list[list[int]]:
        """The pairs of each group: packing them again gives the same rows, of which each group takes `rows`."""
        groups: dict[int, list[int]] = {}
        for i, spot in zip(pairs, pack(lengths, self._limits.row_length), strict=True):
            groups.setdefault(spot.row // rows, []).append(i)
        return [groups[number] for number in sorted(groups)]


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
    usual = min(longest_answer, round_up(int(np.quantile(answer_lengths, 0.98)), 8))
    return RowLimits(row_length, max(row_length // max(shortest, 1), 1), usual, longest_answer)
