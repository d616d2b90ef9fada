"""From prompts and answers to fixed-shape arrays: rows of tokens, and where each answer token is predicted.

Prompts differ in length by a factor of five, so several share a row (packing): each is a segment of its own, with its
own positions, and no token sees another segment. A model sees only (tokens, segment_ids, positions) and
`answer_index`, so nothing outside this file knows how prompts are laid out.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from ragjax.arrays import AnyArray, Ids

# Random micro-batches, and steps made of them, on which the number of rows is tried out.
_TRIED_BATCHES = 200
# A row of so many tokens spends about as much on attention as on its linear layers (SmolLM2 on a CPU).
_ATTENTION_LENGTH = 1600


class Rows(NamedTuple):
    """What the generator reads: B questions with K prompts each, laid out in R rows of S tokens."""

    tokens: Int32[AnyArray, "R S"]
    segment_ids: Int32[AnyArray, "R S"]  # 1, 2, ... for the prompts of a row, 0 = padding
    positions: Int32[AnyArray, "R S"]
    answer_index: Int32[AnyArray, "B K T 2"]  # (row, column) of the state that predicts each answer token
    answer_tokens: Int32[AnyArray, "B T"]
    answer_mask: Bool[AnyArray, "B T"]
    dropout_ids: Int32[AnyArray, "R S"]  # the same for a prompt's token wherever it lies


class Batch(NamedTuple):
    """One micro-batch of training: the embedder's question, the passages' vectors and the generator's rows."""

    question_tokens: Int32[AnyArray, "B W"]
    question_lengths: Int32[AnyArray, " B"]  # 0 = filler
    passage_vectors: Float32[AnyArray, "B K E"]
    rows: Rows


class ScoredBatch(NamedTuple):
    """One micro-batch for the embedder alone: the frozen generator's answer log-probs are in it."""

    question_tokens: Int32[AnyArray, "B W"]
    question_lengths: Int32[AnyArray, " B"]  # 0 = filler
    passage_vectors: Float32[AnyArray, "B K E"]
    answer_log_probs: Float32[AnyArray, "B K T"]
    answer_mask: Bool[AnyArray, "B T"]


class DrawnBatch(NamedTuple):
    """One micro-batch with the answers' log-probs under all K passages, and rows for the m drawn of each question."""

    scored: ScoredBatch
    rows: Rows  # of the drawn passages: its K is m
    drawn: Int32[AnyArray, "B m"]  # their places among the K
    weights: Float32[AnyArray, "B m"]  # what the gradient through each is multiplied by


class RankingBatch(NamedTuple):
    """One micro-batch of ranking: its questions, and the candidates of the whole step."""

    question_tokens: Int32[AnyArray, "B W"]
    question_lengths: Int32[AnyArray, " B"]  # 0 = filler
    candidate_vectors: Float32[AnyArray, "P E"]
    labels: Int32[AnyArray, " B"]  # the positive's place among the candidates
    candidate_mask: Bool[AnyArray, "B P"]  # false where a candidate is not a negative


class Placed(NamedTuple):
    """Where a prompt lies."""

    row: int
    column: int


class Example(NamedTuple):
    """One question ready for batching."""

    index: int  # the question's place in its split
    question_tokens: Ids  # the embedder's tokens, specials included
    passage_vectors: Float32[AnyArray, "B K E"]
    prompts: Sequence[Ids]  # the generator's tokens under each passage (or one concatenated prompt)
    answer: Ids  # the generator's tokens, end token included
    places: Sequence[Placed] = ()  # of each prompt, among the rows of its micro-batch: see `place_examples`


class ScoredExample(NamedTuple):
    """One question whose answer has been scored under each passage."""

    question_tokens: Ids  # the embedder's tokens, specials included
    passage_vectors: Float32[AnyArray, "K E"]
    scores: Float32[np.ndarray, "K T"]  # of the answer's own tokens


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """A compiled shape: R rows of S tokens, T answer tokens."""

    rows: int
    row_length: int
    answer_length: int


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def length_bucket(length: int) -> int:
    """The padded length of prompts that are read at once: multiples of 64 up to 512, of 128 up to 1024, of 256 up to
    2048 and so on.

    Every one that is used is compiled, and padding takes time as tokens do: a quarter at most here, beyond the first.
    Prompts of 450 to 1,300 tokens, five passages of HotPotQA, take 7 programs; multiples of 64 took 14.
    """
    step = 64
    while length > 8 * step:
        step *= 2
    return round_up(length, step)


def pack(lengths: Sequence[int], row_length: int) -> list[Placed]:
    """Places sequences into rows of `row_length` tokens, longest first, each into the first row with room."""
    used: list[int] = []
    placed = [Placed(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((row for row, taken in enumerate(used) if taken + lengths[i] <= row_length), len(used))
        if row == len(used):
            used.append(0)
        placed[i] = Placed(row, used[row])
        used[row] += lengths[i]
    return placed


def choose_shapes(
    lengths: Sequence[int], answer_lengths: Sequence[int], prompts_per_batch: int, longest: int, parts: int = 1
) -> tuple[Shape, ...]:
    """At most three shapes, so that a run compiles few training steps; all parts of a step share one.

    How rows fill is tried out on random steps. Of row lengths from the longest prompt to three times that, the one with
    the least work wins: padded tokens, times what attention adds to a token in a longer row. The first shape holds a
    third of the tried steps and the second two thirds, with answers of the usual length. The third has one row more
    than any of them needed, because passages that are found are longer than passages at random, and every answer's
    length. It decides the memory that a run takes, so there is none with a row for every prompt: a step that does not
    fit the third is for the caller to cut.

    Args:
      lengths: a sample of prompt lengths (with the answer), in tokens.
      answer_lengths: lengths of all training answers, in tokens.
      prompts_per_batch: prompts in one device's micro-batch.
      longest: a bound that no prompt with its answer exceeds.
      parts: micro-batches of a step, over all devices.
    """
    rng = np.random.default_rng(0)
    draws = rng.choice(np.asarray(lengths), (_TRIED_BATCHES, prompts_per_batch)).tolist()
    steps = rng.integers(_TRIED_BATCHES, size=(_TRIED_BATCHES, parts))
    shortest_row = round_up(longest, 64)
    work, row_length, rows = min(
        _work_of(row_length, draws, steps, prompts_per_batch)
        for row_length in range(shortest_row, 3 * shortest_row + 1, 64)
    )
    longest_answer, usual_answer = round_up(max(answer_lengths), 8), usual_length(answer_lengths)
    shapes = {Shape(count, row_length, usual_answer) for count in rows[:-1]}
    return tuple(sorted({*shapes, Shape(rows[-1], row_length, longest_answer)}))


def usual_length(answer_lengths: Sequence[int]) -> int:
    """A padded length for nearly all answers: a few long ones do not widen every step."""
    return round_up(int(np.quantile(answer_lengths, 0.98)), 8)


def _work_of(
    row_length: int, draws: Sequence[Ids], steps: np.ndarray, prompts_per_batch: int
) -> tuple[float, int, list[int]]:
    """(mean work of the tried steps, the row length, how many rows the shapes have).

    draws: prompt lengths of the tried micro-batches; steps [n, parts]: those that each step is made of.
    """
    needed = np.array([1 + max(place.row for place in pack(draw, row_length)) for draw in draws])[steps].max(axis=1)
    most = min(int(needed.max()) + 1, prompts_per_batch)
    rows = sorted({*(int(np.ceil(np.quantile(needed, share))) for share in (1 / 3, 2 / 3)), most})
    fitting = [next(count for count in rows if count >= step) for step in needed]
    return float(np.mean(fitting)) * row_length * (1 + row_length / _ATTENTION_LENGTH), row_length, rows


def sequence_lengths(prompts: Sequence[Sequence[Ids]], answers: Sequence[Ids]) -> list[int]:
    """Tokens of each prompt with its answer, question by question; the last answer token is never read."""
    return [len(prompt) + len(answer) - 1 for group, answer in zip(prompts, answers, strict=True) for prompt in group]


def place_examples(examples: Sequence[Example], row_length: int) -> list[Example]:
    """The examples of one micro-batch, each with the places of its prompts in rows of `row_length` tokens."""
    places = iter(pack(sequence_lengths([e.prompts for e in examples], [e.answer for e in examples]), row_length))
    return [example._replace(places=list(itertools.islice(places, len(example.prompts)))) for example in examples]


def fit_shape(shapes: Sequence[Shape], examples: Sequence[Example]) -> Shape | None:
    """The first shape that holds the placed examples of all micro-batches; None where none does."""
    rows = max(1 + place.row for example in examples for place in example.places)
    answer = max(len(example.answer) for example in examples)
    return next((shape for shape in shapes if shape.rows >= rows and shape.answer_length >= answer), None)


def make_rows(
    prompts: Sequence[Sequence[Ids]],
    answers: Sequence[Ids],
    indices: Sequence[int],
    shape: Shape,
    size: int,
    places: Sequence[Placed] = (),
) -> Rows:
    """Lays out prompts [b][K] and answers [b] of b <= size questions; the rest are fillers with empty masks.

    places: of the b * K prompts; they are packed here where it is left out.
    """
    passages = len(prompts[0])
    tokens = np.zeros((shape.rows, shape.row_length), np.int32)
    segment_ids, positions, dropout_ids = np.zeros_like(tokens), np.zeros_like(tokens), np.zeros_like(tokens)
    answer_index = np.zeros((size, passages, shape.answer_length, 2), np.int32)
    answer_tokens = np.zeros((size, shape.answer_length), np.int32)
    answer_mask = np.zeros((size, shape.answer_length), bool)
    remaining = iter(places or pack(sequence_lengths(prompts, answers), shape.row_length))
    for b, (group, answer) in enumerate(zip(prompts, answers, strict=True)):
        answer_tokens[b, : len(answer)] = answer
        answer_mask[b, : len(answer)] = True
        for k, prompt in enumerate(group):
            row, column = next(remaining)
            ids = [*prompt, *answer[:-1]]
            span = slice(column, column + len(ids))
            tokens[row, span] = ids
            segment_ids[row, span] = segment_ids[row].max() + 1
            positions[row, span] = np.arange(len(ids))
            # Wraps around on long runs, which costs nothing: two tokens then drop the same features.
            dropout_ids[row, span] = (indices[b] * passages + k) * shape.row_length % 2**30 + np.arange(len(ids))
            answer_index[b, k, : len(answer), 0] = row
            answer_index[b, k, : len(answer), 1] = column + len(prompt) - 1 + np.arange(len(answer))
    return Rows(tokens, segment_ids, positions, answer_index, answer_tokens, answer_mask, dropout_ids)


def make_example_rows(examples: Sequence[Example], shape: Shape, size: int) -> Rows:
    """`make_rows` of examples."""
    return make_rows(
        [example.prompts for example in examples],
        [example.answer for example in examples],
        [example.index for example in examples],
        shape,
        size,
        [place for example in examples for place in example.places],
    )


def make_batch(examples: Sequence[Example], shape: Shape, size: int, question_length: int) -> Batch:
    """One device's micro-batch of `size` questions; missing ones become fillers that count nowhere."""
    question_tokens, question_lengths = pad_tokens([e.question_tokens for e in examples], size, question_length)
    passage_vectors = fill_up([example.passage_vectors for example in examples], size)
    return Batch(question_tokens, question_lengths, passage_vectors, make_example_rows(examples, shape, size))


def make_scored_batch(
    examples: Sequence[ScoredExample], answer_length: int, size: int, question_length: int
) -> ScoredBatch:
    """One device's micro-batch of `size` questions and answers of up to `answer_length` tokens, fillers as above."""
    question_tokens, question_lengths = pad_tokens([e.question_tokens for e in examples], size, question_length)
    passage_vectors = fill_up([example.passage_vectors for example in examples], size)
    lengths = fill_up([example.scores.shape[1] for example in examples], size)
    padded = [np.pad(e.scores, ((0, 0), (0, answer_length - e.scores.shape[1]))) for e in examples]
    mask = np.arange(answer_length) < lengths[:, None]
    return ScoredBatch(question_tokens, question_lengths, passage_vectors, fill_up(padded, size), mask)


def fill_up(values: Sequence[AnyArray | int], size: int) -> np.ndarray:
    """[size, ...] from fewer values of one shape; zeros stand for those missing."""
    made = np.stack(values)
    return np.concatenate([made, np.zeros((size - len(made), *made.shape[1:]), made.dtype)])


class LikeBatch(NamedTuple):
    """Texts of like length that are encoded together."""

    chosen: list[int]  # their places among all
    length: int  # that they are padded to
    rows: int  # of each group, filler rows included


def like_batches(lengths: Sequence[int], longest: int, most: Callable[[int], int], groups: int = 1) -> list[LikeBatch]:
    """Texts of these lengths in batches, longest first.

    A batch has as many rows as it may, or of the few sizes that a remainder may have, as each is compiled.

    Args:
      lengths: tokens of each text.
      longest: of them, at most.
      most: length -> rows of a group at most.
      groups: that share a batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    batches, start = [], 0
    while start < len(order):
        length = min(round_up(lengths[order[start]], 16), longest)
        chosen = order[start : start + groups * most(length)]
        share = -(-len(chosen) // groups)
        batches.append(LikeBatch(chosen, length, min(1 << (share - 1).bit_length(), most(length))))
        start += len(chosen)
    return batches


def pad_tokens(
    sequences: Sequence[Ids], size: int, length: int
) -> tuple[Int32[np.ndarray, "R S"], Int32[np.ndarray, " R"]]:
    """Right-padded tokens [size, length] and lengths [size] (0 for the rows that are missing)."""
    tokens = np.zeros((size, length), np.int32)
    lengths = np.zeros(size, np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
        lengths[row] = len(sequence)
    return tokens, lengths
