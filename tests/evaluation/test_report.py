"""Bootstrap intervals against enumeration and the normal approximation; the printed tables."""

import itertools

import numpy as np
import pytest

from ragjax.evaluation import report


def test_a_constant_difference_has_an_interval_of_no_width():
    before = [0.0, 0.25, 0.5]
    assert report.paired_interval(before, [value + 0.25 for value in before]) == (0.25, 0.25, 0.25)


def test_interval_equals_the_quantiles_of_all_resamples():
    values = [0.0, 1.0, 3.0, 10.0]
    means = sorted(np.mean(draw) for draw in itertools.product(values, repeat=4))
    mean, low, high = report.mean_interval(values, resamples=100_000)
    assert mean == 3.5
    # Of all 256 resamples, 0.025 * 256 = 6.4 and 0.975 * 256 = 249.6: the 7th and the 250th. Both steps are
    # wide enough (2 % to 4 %, 96 % to 98 %) for 100,000 draws.
    assert low == means[6] == 0.5
    assert high == means[249] == 7.75


def test_interval_of_many_questions_is_near_the_normal_one():
    rng = np.random.default_rng(3)
    difference = rng.normal(0.3, 1.0, 2000)
    before = rng.uniform(size=2000)
    mean, low, high = report.paired_interval(before, before + difference, resamples=4000)
    half = 1.959964 * difference.std() / np.sqrt(2000)
    assert mean == pytest.approx(difference.mean(), abs=1e-12)
    assert low == pytest.approx(difference.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(difference.mean() + half, abs=0.05 * half)


def test_interval_is_that_of_the_pairs():
    before = np.random.default_rng(0).normal(0, 100, 200)
    after = before + np.tile([0.9, 1.1], 100)
    _, low, high = report.paired_interval(before, after, resamples=500)
    assert 0.98 < low < high < 1.02  # unpaired, it would be some 40 wide


def test_direction_and_questions_without_a_value():
    assert report.paired_interval([0.0, None, 0.5, None], [1.0, 1.0, None, None]) == (1.0, 1.0, 1.0)
    assert report.paired_interval([1.0], [0.0]) == (-1.0, -1.0, -1.0)
    assert report.paired_interval([None], [1.0]) is None
    assert report.paired_interval([], []) is None


def test_the_seed_decides(monkeypatch):
    values = list(np.random.default_rng(1).normal(size=50))
    first = report.mean_interval(values, seed=1)
    assert first == report.mean_interval(values, seed=1)
    assert first != report.mean_interval(values, seed=2)
    monkeypatch.setattr(report, "_DRAWS_AT_ONCE", 333)  # many small blocks, the last one shorter
    assert report.mean_interval(values, seed=1)[1:] == pytest.approx(first[1:], abs=0.05)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="shorter|longer"):
        report.paired_interval([1.0, 2.0], [1.0])


def test_before_after_table():
    before = {"em": 0.1, "f1": 0.25, "contains": 0.3, "recall_at_5": None, "hit_at_5": 1.0}
    after = {"em": 0.35, "f1": 0.2, "contains": 0.3, "recall_at_5": None, "hit_at_5": 1.0}
    intervals = {"em": (0.25, 0.1, 0.4), "f1": (-0.05, -0.1125, 0.01), "recall_at_5": None}
    assert report.before_after_table(before, after, intervals).splitlines() == [
        "metric       before  after  change  95 % interval of the change",
        "-----------  ------  -----  ------  ---------------------------",
        "em            0.100  0.350  +0.250             [+0.100, +0.400]",
        "f1            0.250  0.200  -0.050             [-0.113, +0.010]",
        "contains      0.300  0.300  +0.000                            -",
        "recall_at_5       -      -       -                            -",
        "hit_at_5      1.000  1.000  +0.000                            -",
    ]


def test_cost_table():
    cost = {
        "seconds": 63.04,
        "tokens": 1_234_567,
        "flops": 3.5e14,
        "embedder": {"seconds": 12.34, "tokens": 4567, "flops": 5e13},
        "generator": {"seconds": 50.0, "tokens": 1_230_000, "flops": 3e14},
        "search": {"seconds": 0.7, "tokens": 0, "flops": 2e9},
        "evaluation": {"seconds": 100.0, "tokens": 99, "flops": None},
    }
    assert report.cost_table(cost).splitlines() == [
        "part                seconds     tokens   TFLOPs",
        "------------------  -------  ---------  -------",
        "embedder               12.3      4,567   50.000",
        "generator              50.0  1,230,000  300.000",
        "search                  0.7          0    0.002",
        "encode                    -          -        -",
        "total                  63.0  1,234,567  350.000",
        "evaluation (apart)    100.0         99        -",
    ]


def test_the_table_of_strategies():
    costs = [
        {"strategy": "generator", "seconds": 1200.0, "is_measured": True},
        {"strategy": "two_phase", "seconds": 1800.04, "is_measured": False},
        {"strategy": "joint", "seconds": None, "is_measured": False},
    ]
    assert report.strategy_table(costs).splitlines() == [
        "strategy   seconds  of generator's    figures",
        "---------  -------  --------------  ---------",
        "generator  1,200.0            1.00   measured",
        "two_phase  1,800.0            1.50  estimated",
        "joint            -               -          -",
    ]
