"""What runs will take, by hand."""

import dataclasses
from pathlib import Path

import pytest

from ragjax.comparison import Pace, plan_cells
from ragjax.config import CompareConfig, RunConfig
from ragjax.data.dataset import Dataset
from ragjax.data.passages import PassageList
from ragjax.data.questions import Passage, Question

# A prompt of a question takes 2 s to read, its answer 7 s.
PACE = Pace(
    passage_seconds=0.5,
    prompts_seconds=2.0,
    answer_seconds=7.0,
    question_seconds=0.1,
    trained_bytes={"embedder": 100, "generator": 10},
    weight_bytes=5000,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    def asked(split, count, labelled):
        return [Question(f"{split}{i}", "why?", ("so",), ("p",) if i < labelled else ()) for i in range(count)]

    splits = {"train": asked("train", 12, 6), "dev": asked("dev", 5, 0), "test": asked("test", 3, 0)}
    return Dataset(folder=tmp_path_factory.getbasetemp(), name="made", sha256="0", passages=PassageList([]), **splits)


def cells(**flags):
    config = RunConfig(run_dir="matrix", batch_size=4, ranking_batch_size=3, dev_limit=24, **flags)
    return {cell.row: cell for cell in plan_cells(config, CompareConfig())}


def test_seconds_are_those_of_a_runs_parts(dataset):
    seconds = {row: PACE.cell_seconds(cell, dataset) for row, cell in cells().items()}
    answers = 3 * 7.0
    # Three steps of four questions, each 1 / 0.35 forward passes, and four measurements of five dev questions.
    generator = 12 * 2.0 / 0.35 + 4 * 5 * 2.0
    # Two steps of three of the six labelled questions: forward and twice that backward.
    labels = 6 * 3 * 0.1
    # Each of the twelve training and five dev questions is read once, with some more passages than were found first.
    phase_2 = 12 * 3 * 0.1 + (12 + 5) * 1.3 * 2.0
    assert seconds == {
        "none": pytest.approx(answers),
        "embedder": pytest.approx(labels + answers),
        "generator": pytest.approx(generator + answers),
        "independent": pytest.approx(labels + generator + answers),
        "two_phase": pytest.approx(generator + phase_2 + answers),
        "rag_sequence": pytest.approx(generator + 12 * 3 * 0.1 + answers),
        "rag_token": pytest.approx(generator + 12 * 3 * 0.1 + answers),
    }


def test_passages_that_do_not_go_backward_are_only_read(dataset):
    """Two of the five: each question's prompts are read once, and two fifths of them are learnt from."""
    seconds = PACE.cell_seconds(cells(backward_passages=2)["generator"], dataset)
    assert seconds == pytest.approx(12 * 2.0 * (1 + 0.4 / 0.35) + 4 * 5 * 2.0 + 3 * 7.0)


def test_passages_that_follow_the_embedder_are_encoded_again():
    """Ten of them, 0.5 s each: joint training of twelve questions has three steps, label training two."""
    dataset = Dataset(
        folder=Path(), name="made", sha256="0", passages=PassageList([Passage(f"p{i}", "", "x") for i in range(10)]),
        train=[Question(f"q{i}", "why?", ("so",), ("p1",) if i < 6 else ()) for i in range(12)], dev=[], test=[],
    )  # fmt: skip
    for flags, joint, labels in (({"dev_every": 0}, 2, 1), ({"dev_every": 2}, 2, 1), ({}, 3, 2)):
        once = cells(**flags | {"refresh_passages": 1 if flags != {"dev_every": 2} else 5})
        never = cells(**flags)
        for row, count in (("rag_token", joint), ("embedder", labels), ("independent", labels), ("generator", None)):
            longer = PACE.cell_seconds(once[row], dataset) - PACE.cell_seconds(never[row], dataset)
            assert longer == pytest.approx(0.0 if count is None else (count + 1) * 5.0), (row, flags)
    stored = dataclasses.replace(PACE, vector_bytes=1000)
    assert stored.cell_bytes(cells(refresh_passages=1)["two_phase"]) == 9 * 110 + 2 * 1000
    assert stored.cell_bytes(cells()["two_phase"]) == 9 * 110


def test_what_is_taken_over_takes_no_time(dataset):
    rows = cells()
    after = rows["two_phase"].taking_over([rows["generator"]])
    alone = PACE.cell_seconds(rows["two_phase"], dataset)
    trained = PACE.cell_seconds(rows["generator"], dataset)
    assert PACE.cell_seconds(after, dataset) == pytest.approx(alone - trained + 3 * 7.0)
    assert PACE.cell_bytes(rows["two_phase"]) == 9 * 110 and PACE.cell_bytes(after) == 9 * 100 + 10


def test_flags_that_change_what_a_phase_takes(dataset):
    (generator,) = [PACE.cell_seconds(cells(**flags)["generator"], dataset) for flags in ({"dev_every": 0},)]
    assert generator == pytest.approx(12 * 2.0 / 0.35 + 21)
    full = PACE.cell_seconds(cells(dev_every=0, lora_rank=0)["generator"], dataset)
    assert full == pytest.approx(1.5 * 12 * 2.0 / 0.35 + 21)
    longer = PACE.cell_seconds(cells(dev_every=2, max_steps=5, eval_limit=2)["generator"], dataset)
    assert longer == pytest.approx(20 * 2.0 / 0.35 + (1 + 3) * 5 * 2.0 + 2 * 7.0)


def test_memory_is_that_of_the_largest_phase():
    rows = cells()
    assert PACE.memory_bytes([rows["none"]]) == 5000
    assert PACE.memory_bytes([rows["generator"], rows["two_phase"]]) == 5000 + 4 * 100
    assert PACE.memory_bytes(list(rows.values())) == 5000 + 4 * 110
