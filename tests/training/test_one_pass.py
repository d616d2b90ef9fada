"""A frozen embedder's questions are searched at once: the passages, the work and the number of searches."""

import dataclasses

import numpy as np
import pytest

from ragjax.costs import Ledger
from ragjax.data import load_dataset
from ragjax.pipeline import build_pipeline, load_models
from ragjax.training.signals import AnswerAssembler
from ragjax.training.signals import one_pass as module
from ragjax.training.signals.one_pass import OnePass
from tests.tiny_runs import run_of, tiny_world
from tests.training.signals_worker import placed


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(scope="module")
def run(world):
    """12 training questions in steps of 5: three steps an epoch, the last of two; 3 dev questions."""
    config = world.config(world.folder / "one_pass", strategy="generator", batch_size=5, max_steps=7)
    dataset = load_dataset(world.data)
    return run_of(config, build_pipeline(config, dataset, *load_models(config), show_progress=False), dataset)


class Counted:
    """An index that notes how many questions each search has."""

    def __init__(self, index):
        self.index, self.asked = index, []

    def search(self, queries, k):
        self.asked.append(len(queries.texts))
        return self.index.search(queries, k)

    def describe(self):
        return self.index.describe()


def counted(run):
    retriever = dataclasses.replace(run.pipeline.retriever, index=Counted(run.pipeline.retriever.index))
    return dataclasses.replace(run, pipeline=dataclasses.replace(run.pipeline, retriever=retriever))


def rows_and_costs(assembler, run, steps):
    """Of each step: passage rows, and (FLOPs, tokens) of the embedder and the search."""
    variables, made = placed(run), []
    for step in steps:
        ledger = Ledger()
        batch = assembler.sampler.training_batch(step)
        rows = assembler.assemble(batch, variables, ledger).passage_rows
        parts = {part: ledger.part(part) for part in ("embedder", "search")}
        made.append((rows, {part: (cost.flops, cost.tokens) for part, cost in parts.items()}))
    return made


def test_frozen_and_live_find_the_same_at_the_same_cost(run):
    frozen, live = AnswerAssembler(run, ("generator",)), AnswerAssembler(run, ("embedder", "generator"))
    steps = range(3)
    for (found, cost), (expected, live_cost) in zip(
        rows_and_costs(frozen, run, steps), rows_and_costs(live, run, steps), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
        assert cost["embedder"] == live_cost["embedder"]
        assert cost["search"][0] == pytest.approx(live_cost["search"][0], rel=1e-12) and cost["search"][0] > 0


def test_one_search_for_all_epochs_and_it_is_charged_once(run):
    run = counted(run)
    assembler = AnswerAssembler(run, ("generator",))
    made = rows_and_costs(assembler, run, range(7))
    assert run.pipeline.retriever.index.asked == [12]
    assert [cost["search"][0] > 0 for _, cost in made] == [True] * 3 + [False] * 4
    live = counted(run)
    rows_and_costs(AnswerAssembler(live, ("embedder", "generator")), live, range(4))
    assert live.pipeline.retriever.index.asked == [5, 5, 2, 5]


def test_only_questions_that_will_be_asked_are_searched(run):
    short = dataclasses.replace(counted(run), config=dataclasses.replace(run.config, max_steps=2))
    assembler = AnswerAssembler(short, ("generator",))
    rows_and_costs(assembler, short, range(2))
    assert short.pipeline.retriever.index.asked == [10]


def test_a_resumed_phase_finds_the_same_and_charges_nothing_twice(run):
    """Whatever step comes first, the same questions are embedded in the same batches."""
    begun, resumed = (AnswerAssembler(run, ("generator",)) for _ in range(2))
    whole = rows_and_costs(begun, run, range(7))
    for (rows, cost), (again, cost_again) in zip(whole[4:], rows_and_costs(resumed, run, range(4, 7)), strict=True):
        np.testing.assert_array_equal(rows, again)
        assert cost == cost_again and cost["search"] == (0, 0)


def test_dev_questions_are_searched_once_for_all_measurements(run):
    run = counted(run)
    assembler, spent = AnswerAssembler(run, ("generator",)), []
    for step in (0, 2, 4):
        ledger = Ledger()
        for batch in assembler.sampler.dev_batches(step):
            assembler.assemble(batch, placed(run), ledger)
        spent.append(ledger.part("search").flops > 0)
    assert run.pipeline.retriever.index.asked == [3]
    assert spent == [True, False, False]


def test_pieces_of_the_pass_change_nothing(run, monkeypatch):
    sampler = AnswerAssembler(run, ("generator",)).sampler
    batch = sampler.training_batch(1)
    whole = OnePass(run.pipeline, sampler, 3, 7).retrieve(batch, Ledger())
    monkeypatch.setattr(module, "_AT_ONCE", 5)
    pieces = OnePass(run.pipeline, sampler, 3, 7).retrieve(batch, Ledger())
    np.testing.assert_array_equal(pieces.passage_rows, whole.passage_rows)
    np.testing.assert_allclose(pieces.scores, whole.scores, rtol=1e-5)
