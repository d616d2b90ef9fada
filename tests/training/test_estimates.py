"""What each strategy costs on a run's data, worked by hand from what the run has measured."""

import pytest

from ragjax.costs import Cost, Ledger, ModelSize
from ragjax.training.estimates import MeasuredPhase, strategy_costs

SIZE = ModelSize(layer_weights=100, head_weights=50, lora_weights=10, layers=2, attention_width=4)
LENGTH = 10
# Weights 2 * 110 * 10, attention 4 * 2 * 4 * 10^2; trained, twice the frozen weights and three times the rest.
FORWARD, TRAIN = 2200 + 3200, 2 * 2000 + 3 * (200 + 3200)
SHARE = FORWARD / TRAIN
QUESTIONS, LABELLED = 10, 6


def phase(questions, embedder=0.0, generator=0.0, search=0.0, evaluation=100.0):
    ledger = Ledger()
    parts = {"embedder": embedder, "generator": generator, "search": search, "evaluation": evaluation}
    for part, seconds in parts.items():
        ledger.add(part, Cost(seconds))
    return MeasuredPhase(ledger, questions)


def costs_of(**measured):
    """{strategy: (seconds, every phase of it ran)}."""
    found = strategy_costs(measured, SIZE, LENGTH, QUESTIONS, LABELLED)
    return {cost.strategy: (cost.seconds, cost.is_measured) for cost in found}


def assert_costs(found, **expected):
    assert set(found) == {"embedder", "generator", "independent", "two_phase", "joint"}
    for name, (seconds, is_measured) in expected.items():
        assert found[name] == (None if seconds is None else pytest.approx(seconds), is_measured), name


# Two epochs over ten questions: 46 seconds, besides those of evaluation.
GENERATOR = phase(20, embedder=2.0, generator=40.0, search=4.0)


def test_a_generator_run_tells_the_others():
    """A question's step: 2 s of the generator, 0.1 s of the embedder (forward only), 0.2 s of search."""
    retriever = (2.0 * SHARE + 0.2 + 0.2) * QUESTIONS  # forward, an embedder's training at twice the reading, search
    assert_costs(
        costs_of(generator=GENERATOR),
        generator=(23.0, True),
        embedder=(0.2 * LABELLED, False),
        independent=(23.0 + 0.2 * LABELLED, False),
        two_phase=(23.0 + retriever, False),
        joint=((2.0 + 0.2 + 0.2) * QUESTIONS, False),
    )


def test_phases_that_ran_cost_what_they_cost():
    """Both phases of two_phase, the second over half the questions: each is scaled to one epoch of its own."""
    retriever = phase(5, embedder=1.5, generator=4.0, search=0.5)
    trained = 1.5 / 5
    assert_costs(
        costs_of(generator=GENERATOR, retriever=retriever),
        two_phase=(23.0 + 6.0 / 5 * QUESTIONS, True),
        generator=(23.0, True),
        embedder=(trained * LABELLED, False),
        joint=((2.0 + trained + 4.5 / 25) * QUESTIONS, False),
    )


def test_only_ranking_counts_labelled_questions():
    embedder = phase(12, embedder=3.0)
    assert_costs(
        costs_of(embedder=embedder, generator=GENERATOR),
        embedder=(0.25 * LABELLED, True),
        generator=(2.3 * QUESTIONS, True),
        independent=(0.25 * LABELLED + 2.3 * QUESTIONS, True),
    )


def test_a_joint_run_tells_the_others():
    joint = phase(10, embedder=4.0, generator=20.0, search=1.0)
    generator = (2.0 + 0.2 + 0.1) * QUESTIONS  # the embedder only reads: half of what its training costs
    assert_costs(
        costs_of(joint=joint),
        joint=(25.0, True),
        generator=(generator, False),
        embedder=(0.4 * LABELLED, False),
        independent=(generator + 0.4 * LABELLED, False),
        two_phase=(generator + (2.0 * SHARE + 0.4 + 0.1) * QUESTIONS, False),
    )


def test_a_retriever_run_alone_tells_the_generators_training_by_its_forward_share():
    retriever = phase(10, embedder=4.0, generator=10.0, search=1.0)
    generator = (1.0 / SHARE + 0.2 + 0.1) * QUESTIONS
    assert_costs(costs_of(retriever=retriever), generator=(generator, False), two_phase=(generator + 15.0, False))


def test_what_nothing_tells_is_unknown():
    nothing = (None, False)
    assert_costs(costs_of(), embedder=nothing, generator=nothing, independent=nothing, two_phase=nothing, joint=nothing)
    # Ranking never asks the generator.
    assert_costs(
        costs_of(embedder=phase(12, embedder=3.0)),
        embedder=(0.25 * LABELLED, True),
        generator=nothing,
        independent=nothing,
        two_phase=nothing,
        joint=nothing,
    )


def test_all_weights_train_at_three_times_the_forward_pass():
    whole = ModelSize(layer_weights=100, head_weights=50, lora_weights=0, layers=2, attention_width=4)
    measured = {"generator": phase(10, embedder=1.0, generator=30.0, search=1.0)}
    found = {cost.strategy: cost.seconds for cost in strategy_costs(measured, whole, LENGTH, QUESTIONS, LABELLED)}
    assert found["two_phase"] == pytest.approx(32.0 + (1.0 + 0.2 + 0.1) * QUESTIONS)


def test_where_few_passages_go_backward_reading_is_a_larger_share_of_a_step():
    """Two of five are trained on, and all five are read before."""
    generator = phase(10, embedder=1.0, generator=30.0, search=1.0)
    found = strategy_costs({"generator": generator}, SIZE, LENGTH, QUESTIONS, LABELLED, backward_share=0.4)
    reading = 3.0 * FORWARD / (FORWARD + 0.4 * TRAIN)
    two_phase = next(cost.seconds for cost in found if cost.strategy == "two_phase")
    assert two_phase == pytest.approx(32.0 + (reading + 0.2 + 0.1) * QUESTIONS)
