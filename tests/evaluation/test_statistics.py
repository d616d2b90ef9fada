"""Bootstrap intervals against enumeration and the normal approximation; the paired test against all sign patterns."""

import itertools

import numpy as np
import pytest

from ragjax.evaluation import statistics


def test_a_constant_difference_has_an_interval_of_no_width():
    before = [0.0, 0.25, 0.5]
    assert statistics.paired_interval(before, [value + 0.25 for value in before]) == (0.25, 0.25, 0.25)


def test_interval_equals_the_quantiles_of_all_resamples():
    values = [0.0, 1.0, 3.0, 10.0]
    means = sorted(np.mean(draw) for draw in itertools.product(values, repeat=4))
    mean, low, high = statistics.mean_interval(values, resamples=100_000)
    assert mean == 3.5
    # Of all 256 resamples, 0.025 * 256 = 6.4 and 0.975 * 256 = 249.6: the 7th and the 250th. Both steps are
    # wide enough (2 % to 4 %, 96 % to 98 %) for 100,000 draws.
    assert low == means[6] == 0.5
    assert high == means[249] == 7.75


def test_interval_of_many_questions_is_near_the_normal_one():
    rng = np.random.default_rng(3)
    difference = rng.normal(0.3, 1.0, 2000)
    before = rng.uniform(size=2000)
    mean, low, high = statistics.paired_interval(before, before + difference, resamples=4000)
    half = 1.959964 * difference.std() / np.sqrt(2000)
    assert mean == pytest.approx(difference.mean(), abs=1e-12)
    assert low == pytest.approx(difference.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(difference.mean() + half, abs=0.05 * half)


def test_interval_is_that_of_the_pairs():
    before = np.random.default_rng(0).normal(0, 100, 200)
    after = before + np.tile([0.9, 1.1], 100)
    _, low, high = statistics.paired_interval(before, after, resamples=500)
    assert 0.98 < low < high < 1.02  # unpaired, it would be some 40 wide


def test_direction_and_questions_without_a_value():
    assert statistics.paired_interval([0.0, None, 0.5, None], [1.0, 1.0, None, None]) == (1.0, 1.0, 1.0)
    assert statistics.paired_interval([1.0], [0.0]) == (-1.0, -1.0, -1.0)
    assert statistics.paired_interval([None], [1.0]) is None
    assert statistics.paired_interval([], []) is None


def test_the_seed_decides(monkeypatch):
    values = list(np.random.default_rng(1).normal(size=50))
    first = statistics.mean_interval(values, seed=1)
    assert first == statistics.mean_interval(values, seed=1)
    assert first != statistics.mean_interval(values, seed=2)
    monkeypatch.setattr(statistics, "_DRAWS_AT_ONCE", 333)  # many small blocks, the last one shorter
    assert statistics.mean_interval(values, seed=1)[1:] == pytest.approx(first[1:], abs=0.05)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="shorter|longer"):
        statistics.paired_interval([1.0, 2.0], [1.0])


def p_of_all_signs(differences) -> float:
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=len(differences))]
    return np.mean([total >= abs(sum(differences)) - 1e-9 for total in sums])


def test_p_of_few_questions_counts_every_pattern_of_signs():
    for differences in ([1.0], [1.0, 1.0, 1.0], [1.0, -1.0], [0.5, 0.25, -0.125, 1.0, 0.3], [0.1] * 10):
        before = np.random.default_rng(0).uniform(size=len(differences))
        found = statistics.paired_p_value(before, before + differences)
        assert found == pytest.approx(p_of_all_signs(differences))
    assert statistics.paired_p_value([0.0] * 5, [1.0] * 5) == 2 / 2**5  # both signs of the largest sum


def test_p_of_many_questions_is_near_that_of_all_patterns():
    differences = np.random.default_rng(1).normal(0.2, 1.0, 16)
    exact = p_of_all_signs(differences)
    assert 0.01 < exact < 0.9
    found = statistics.paired_p_value(np.zeros(16), differences, resamples=20_000)
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact / 20_000))


def test_a_sampled_p_is_never_zero():
    """What was seen counts as one of the patterns: of 2^40 none of a thousand others is as large."""
    assert statistics.paired_p_value(np.zeros(40), np.ones(40), resamples=1000) == 1 / 1001


def test_questions_that_do_not_differ_or_have_no_value_count_nowhere():
    before, after = [0.0, 1.0, 0.0, None, 0.5], [1.0, 1.0, 1.0, 1.0, None]
    assert statistics.paired_p_value(before, after) == statistics.paired_p_value([0.0, 0.0], [1.0, 1.0]) == 0.5
    assert statistics.paired_p_value([1.0, 0.5], [1.0, 0.5]) == 1.0
    assert statistics.paired_p_value([None], [1.0]) is None


def test_p_says_how_often_chance_does_as_much():
    """Of pairs without any difference, a share p has a p-value of at most p."""
    rng = np.random.default_rng(2)
    values = [statistics.paired_p_value(np.zeros(12), rng.normal(size=12)) for _ in range(400)]
    for share in (0.05, 0.2, 0.5):
        assert np.mean(np.array(values) <= share) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 400))


def test_an_interval_over_seeds_equals_the_quantiles_of_all_resamples_of_seeds_and_questions():
    values = np.array([[0.0, 1.0, 5.0], [2.0, 4.0, 11.0]])
    means = sorted(
        np.mean([[values[seed, question] for question in questions] for seed in seeds])
        for seeds in itertools.product(range(2), repeat=2)
        for questions in itertools.product(range(3), repeat=3)
    )
    mean, low, high = statistics.seeds_interval(values.tolist(), resamples=400_000)
    assert mean == pytest.approx(23 / 6, abs=1e-12)
    # Of all 108 resamples, 0.025 * 108 = 2.7 and 0.975 * 108 = 105.3: the third and the 106th, each of a plateau.
    assert low == pytest.approx(means[2], abs=1e-12)
    assert high == pytest.approx(means[105], abs=1e-12)


def test_an_interval_over_seeds_holds_the_luck_of_the_training():
    questions = np.random.default_rng(0).normal(0, 0.1, 400)
    same, apart = [questions, questions], [questions - 0.5, questions + 0.5]
    _, low, high = statistics.seeds_interval(same)
    assert high - low < 0.05
    _, low, high = statistics.seeds_interval(apart)
    assert (low, high) == (pytest.approx(-0.5, abs=0.05), pytest.approx(0.5, abs=0.05))


def test_one_seed_gives_the_interval_over_questions():
    values = np.random.default_rng(2).normal(size=30).tolist()
    assert statistics.seeds_interval([values]) == statistics.mean_interval(values)
    assert statistics.seeds_interval([]) is None
    assert statistics.seeds_interval([[], []]) is None
    with pytest.raises(ValueError):
        statistics.seeds_interval([[1.0], [1.0, 2.0]])
