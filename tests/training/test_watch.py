"""What a phase remembers of its losses: spikes against the rule in float64, and steps in a row by hand."""

import json

import numpy as np
import pytest

from ragjax.training.watch import LossWatch, in_a_row


def spikes(losses, watch: LossWatch) -> list[int]:
    return [place for place, loss in enumerate(losses) if watch.is_spike(loss)]


def test_a_spike_is_five_robust_deviations_above_the_median_of_the_last_64():
    losses = np.random.default_rng(3).lognormal(1.0, 0.8, 400)
    expected = []
    for place in range(16, len(losses)):
        before = losses[max(0, place - 64) : place]
        deviation = 1.4826 * np.median(np.abs(before - np.median(before)))
        if losses[place] > np.median(before) + 5 * deviation:
            expected.append(place)
    assert spikes(losses.tolist(), LossWatch()) == expected
    assert 3 < len(expected) < 20


def test_sixteen_losses_come_before_the_first_spike():
    quiet = [1.0, 1.1] * 8
    assert spikes([*quiet[:15], 9.0, 9.0], LossWatch()) == [16]
    assert spikes([*quiet, 9.0], LossWatch()) == [16]


def test_losses_without_any_spread_tell_nothing():
    """Half of them are the same, as where all answers are known by heart."""
    assert spikes([0.0] * 20 + [0.1, 0.2], LossWatch()) == []


@pytest.mark.parametrize("place", [5, 70, 200])
def test_a_resumed_watch_sees_the_same(place):
    losses = np.random.default_rng(4).lognormal(1.0, 0.8, 300).tolist()
    whole, first = LossWatch(), LossWatch(skipped=[2])
    expected = [spike for spike in spikes(losses, whole) if spike >= place]
    assert expected
    spikes(losses[:place], first)
    resumed = LossWatch(**json.loads(json.dumps(first.as_dict())))
    assert [place + spike for spike in spikes(losses[place:], resumed)] == expected
    assert resumed.skipped == [2]


@pytest.mark.parametrize(("step", "count"), [(1, 0), (3, 1), (4, 2), (5, 0), (9, 3)])
def test_steps_that_were_skipped_in_a_row(step, count):
    assert in_a_row([3, 4, 7, 8, 9], step) == count
