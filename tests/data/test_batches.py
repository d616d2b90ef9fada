"""Rows: every prompt placed once, every answer token predicted from the state before it, few shapes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragjax.data.batches import (
    Example,
    QuestionLengths,
    Shape,
    choose_shapes,
    fit_shape,
    length_bucket,
    make_batch,
    make_rows,
    pack,
    pad_tokens,
    place_examples,
    round_up,
    sequence_lengths,
)
from tests.tiny_modules import random_examples


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(40, 90))
def test_packing_places_everything_once_without_overlap(lengths, row_length):
    placed = pack(lengths, row_length)
    assert len(placed) == len(lengths)
    taken = np.zeros((len(lengths), row_length), int)
    for place, length in zip(placed, lengths, strict=True):
        assert place.column + length <= row_length
        taken[place.row, place.column : place.column + length] += 1
    assert taken.max() == 1 and taken.sum() == sum(lengths)
    used = 1 + max(place.row for place in placed)
    assert (taken[:used].sum(axis=1) > 0).all()
    # First fit never leaves two rows that would fit into one.
    filled = sorted(taken[:used].sum(axis=1))
    assert used == 1 or filled[0] + filled[1] > row_length


def test_packing_by_hand():
    # Longest first: 6 opens row 0, 5 row 1, 4 fills row 0, 3 and 2 fill row 1.
    assert [tuple(place) for place in pack([3, 6, 2, 5, 4], 10)] == [(1, 5), (0, 0), (1, 8), (1, 0), (0, 6)]


def test_padded_lengths_are_few():
    assert [length_bucket(length) for length in (1, 64, 65, 257, 512, 513, 769, 1000, 1025, 1537, 4000)] == [
        *(64, 64, 128, 320, 512),
        *(640, 896, 1024, 1280, 1792, 4096),
    ]
    assert all(length <= length_bucket(length) < max(1.25 * length, length + 64) for length in range(1, 5000))
    assert len({length_bucket(length) for length in range(450, 1301)}) == 7


def test_rows_by_hand():
    """Two prompts of one question in a row: tokens, segments, positions, and the state before each answer token."""
    rows = make_rows([[[11, 12, 13], [14]]], [[21, 22, 2]], [7], Shape(2, 10, 4), size=2)
    # The last answer token is never read: 3 + 2 and 1 + 2 tokens.
    np.testing.assert_array_equal(rows.tokens, [[11, 12, 13, 21, 22, 14, 21, 22, 0, 0], [0] * 10])
    np.testing.assert_array_equal(rows.segment_ids, [[1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [0] * 10])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 3, 4, 0, 1, 2, 0, 0], [0] * 10])
    # Token 13 at column 2 predicts 21, and so on; under the second passage token 14 at column 5 does.
    np.testing.assert_array_equal(rows.answer_index[0, :, :3], [[[0, 2], [0, 3], [0, 4]], [[0, 5], [0, 6], [0, 7]]])
    np.testing.assert_array_equal(rows.answer_tokens, [[21, 22, 2, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.answer_mask, [[True, True, True, False], [False] * 4])
    # Prompt k of question i owns the ids from (i * K + k) * S.
    np.testing.assert_array_equal(rows.dropout_ids[0, :8], [140, 141, 142, 143, 144, 150, 151, 152])


@pytest.mark.parametrize("seed", range(4))
def test_answer_index_points_before_each_answer_token(seed):
    examples = random_examples(5, seed)
    shape = Shape(15, 64, 8)
    rows = make_rows([e.prompts for e in examples], [e.answer for e in examples], range(5), shape, 6)
    seen = np.zeros_like(rows.tokens)
    for b, example in enumerate(examples):
        for k, prompt in enumerate(example.prompts):
            row, column = rows.answer_index[b, k, 0]
            segment = rows.segment_ids[row] == rows.segment_ids[row, column]
            text = [*prompt, *example.answer]
            assert rows.tokens[row, segment].tolist() == text[:-1]
            assert rows.positions[row, segment].tolist() == list(range(len(text) - 1))
            for t in range(len(example.answer)):
                assert rows.answer_index[b, k, t].tolist() == [row, column + t]
                assert rows.positions[row, column + t] == len(prompt) - 1 + t
                assert rows.answer_tokens[b, t] == text[len(prompt) + t]
            seen[row, segment] += 1
    np.testing.assert_array_equal(seen > 0, rows.segment_ids > 0)
    assert seen.max() == 1
    assert rows.answer_mask.sum(axis=1).tolist() == [len(e.answer) for e in examples] + [0]


def test_dropout_ids_belong_to_the_prompt_not_its_place():
    examples, shape = random_examples(4), Shape(12, 64, 8)
    lay = {}
    for name, order in (("forward", [0, 1, 2, 3]), ("backward", [3, 2, 1, 0])):
        chosen = [examples[i] for i in order]
        rows = make_rows([e.prompts for e in chosen], [e.answer for e in chosen], order, shape, 4)
        lay[name] = {
            (i, k): rows.dropout_ids[rows.answer_index[b, k, 0, 0]][
                rows.segment_ids[rows.answer_index[b, k, 0, 0]] == rows.segment_ids[tuple(rows.answer_index[b, k, 0])]
            ].tolist()
            for b, i in enumerate(order)
            for k in range(3)
        }
    assert lay["forward"] == lay["backward"]
    everything = [token for ids in lay["forward"].values() for token in ids]
    assert len(set(everything)) == len(everything)


def test_dropout_ids_stay_in_range_on_long_runs():
    rows = make_rows([[[11, 12]]], [[2]], [2**40], Shape(1, 64, 8), 1)
    assert (rows.dropout_ids >= 0).all()


lengths = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@settings(max_examples=15)  # each tries hundreds of batches out
@given(lengths, st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 12))
def test_shapes_are_few_and_hold_every_prompt(lengths, answer_lengths, prompts_per_batch):
    longest = max(lengths)
    shapes = choose_shapes(
        [QuestionLengths([length], 1) for length in lengths], answer_lengths, prompts_per_batch, longest
    )
    assert 1 <= len(shapes) <= 3
    assert len({shape.row_length for shape in shapes}) == 1
    assert shapes[0].row_length % 64 == 0 and longest <= shapes[0].row_length <= 3 * round_up(longest, 64)
    worst = shapes[-1]
    assert 1 <= worst.rows <= prompts_per_batch and worst.answer_length >= max(answer_lengths)
    assert list(shapes) == sorted(shapes)


def test_rows_are_as_long_as_least_work_asks():
    # Two prompts of 65 tokens: one row of 192 is less than two of 128. Of 64: two of 64 have less attention than one of
    # 128.
    assert choose_shapes([QuestionLengths([65], 3)], [3], 2, longest=65) == (Shape(1, 192, 8), Shape(2, 192, 8))
    assert choose_shapes([QuestionLengths([64, 64], 3)], [3], 1, longest=64) == (Shape(2, 64, 8),)
    # A single prompt wants a row of its own length.
    assert choose_shapes([QuestionLengths([60], 9)], [9], 1, longest=64) == (Shape(1, 64, 16),)


def test_shapes_are_those_with_the_least_work():
    """Against all pairs of smaller shapes beside the largest, on many more steps than they were chosen by."""
    rng = np.random.default_rng(5)
    asked = [
        QuestionLengths(rng.integers(40, 200, 5).tolist(), int(rng.choice([3, 12], p=[0.9, 0.1]))) for _ in "x" * 300
    ]
    shapes = choose_shapes(asked, [3] * 99 + [12], 4, 220)
    row_length, largest = shapes[0].row_length, shapes[-1]

    def work(shape):
        return shape.rows * row_length * (1 + row_length / 1600) + 0.25 * 20 * shape.answer_length

    steps = [rng.integers(300, size=4) for _ in range(1500)]
    needed = [
        (
            1 + max(p.row for p in pack([n for i in step for n in asked[i].prompts], row_length)),
            max(asked[i].answer for i in step),
        )
        for step in steps
    ]

    def mean_work(chosen):
        return np.mean(
            [
                min(work(s) for s in {*chosen, largest} if (s.rows >= r and s.answer_length >= t) or s == largest)
                for r, t in needed
            ]
        )

    possible = [Shape(rows, row_length, t) for rows in range(1, largest.rows) for t in (8, 16)]
    least = min(mean_work(pair) for pair in itertools.combinations(possible, 2))
    assert len(shapes) == 3 and largest.answer_length == 16
    assert least <= mean_work(shapes) <= 1.02 * least


def test_shapes_are_those_of_whole_steps():
    """Eight devices with four questions each: a step's rows are those of the fullest device."""
    rng = np.random.default_rng(3)
    answers = [3] * 99 + [30]
    asked = [QuestionLengths(rng.integers(60, 330, 5).tolist(), rng.choice(answers)) for _ in range(600)]

    def shapes_used(shapes):
        used = []
        for _ in range(200):
            examples = []
            for _ in range(8):
                part = [
                    Example(0, [1], np.zeros((1, 4)), [[5] * n for n in asked[i].prompts], [2] * asked[i].answer)
                    for i in rng.integers(len(asked), size=4)
                ]
                examples += place_examples(part, shapes[0].row_length)
            used.append(fit_shape(shapes, examples))
        return used

    whole = choose_shapes(asked, answers, 4, 360, parts=8)
    used = shapes_used(whole)
    assert used.count(None) <= 4
    # A quarter of the steps hold one of 32 answers that is long: they need neither a row for every prompt nor the
    # largest shape.
    longer = [shape for shape in used if shape and shape.answer_length == 32]
    assert len(longer) > 40 > 2 * longer.count(whole[-1]) and whole[-1].rows < 20
    # Shapes that are made for one micro-batch are too small for the fullest of eight.
    alone = choose_shapes(asked, answers, 4, 360)
    assert used.count(whole[0]) > 30 > shapes_used(alone).count(alone[0])


def test_fit_takes_the_first_shape_that_holds_every_group():
    shapes = (Shape(1, 64, 8), Shape(2, 64, 8), Shape(6, 64, 16))

    def example(prompt, answer, prompts=1):
        return Example(0, [1], np.zeros((1, 4)), [[5] * prompt] * prompts, [2] * answer)

    def fitting(*groups):
        return fit_shape(shapes, [placed for group in groups for placed in place_examples(group, 64)])

    assert fitting([example(20, 4)], [example(30, 1)]) == shapes[0]
    assert fitting([example(20, 4)], [example(30, 1, prompts=3)]) == shapes[1]  # 3 * 30 > 64
    assert fitting([example(20, 9)]) == shapes[2]  # one long answer
    assert fitting([example(61, 4)]) == shapes[0]  # 61 + 4 - 1: the last token is never read
    assert fitting([example(60, 4, prompts=3)]) == shapes[2]
    assert fitting([], [example(5, 1)]) == shapes[0]  # a device without questions
    assert fitting([example(60, 4, prompts=7)]) is None
    assert fitting([example(20, 17)]) is None


def test_a_batch_that_fits_its_shape_is_laid_out():
    examples = random_examples(6, seed=9)
    lengths = sequence_lengths([e.prompts for e in examples], [e.answer for e in examples])
    assert lengths == [len(p) + len(e.answer) - 1 for e in examples for p in e.prompts]
    asked = [QuestionLengths(lengths[3 * i : 3 * i + 3], len(example.answer)) for i, example in enumerate(examples)]
    shapes = choose_shapes(asked, [len(e.answer) for e in examples], 2, max(lengths))
    for start in range(0, 6, 2):
        chosen = examples[start : start + 2]
        placed = place_examples(chosen, shapes[0].row_length)
        batch = make_batch(placed, fit_shape(shapes, placed), size=2, question_length=8)
        tokens = sum(sequence_lengths([e.prompts for e in chosen], [e.answer for e in chosen]))
        assert (batch.rows.segment_ids > 0).sum() == tokens


def test_missing_questions_become_fillers():
    examples = random_examples(2)
    batch = make_batch(examples, Shape(6, 64, 8), size=4, question_length=8)
    assert batch.question_lengths.tolist() == [len(e.question_tokens) for e in examples] + [0, 0]
    assert not batch.rows.answer_mask[2:].any() and not batch.passage_vectors[2:].any()
    np.testing.assert_array_equal(batch.passage_vectors[:2], [e.passage_vectors for e in examples])
    for b, example in enumerate(examples):
        assert batch.question_tokens[b, : len(example.question_tokens)].tolist() == list(example.question_tokens)
    assert {leaf.dtype for leaf in batch.rows} == {np.dtype(np.int32), np.dtype(bool)}


def test_small_helpers():
    assert [round_up(n, 64) for n in (1, 64, 65, 128)] == [64, 64, 128, 128]
    tokens, lengths = pad_tokens([[5, 6, 7], [8]], size=3, length=4)
    assert tokens.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [0, 0, 0, 0]] and lengths.tolist() == [3, 1, 0]
    assert tokens.dtype == lengths.dtype == np.int32
