"""Signals that are held back: who gets them afterwards, and what does not wait."""

import signal
import threading

import pytest

from ragjax.stopping import STOPPING, Terminated, held_signals, is_holding


@pytest.fixture(autouse=True)
def handlers():
    """Those of a command that trains; what the tests were begun with comes back."""
    before = {number: signal.getsignal(number) for number in STOPPING}

    def terminate(*_):
        raise Terminated

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, terminate)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_waits_for_the_end_and_then_goes_to_its_handler(number, end):
    before, done = [signal.getsignal(each) for each in STOPPING], []
    with pytest.raises(end), held_signals() as hold:
        assert is_holding() and hold.asked is None
        signal.raise_signal(number)
        assert hold.asked == number
        done.append("saved")
    assert done == ["saved"]
    assert [signal.getsignal(each) for each in STOPPING] == before and not is_holding()


def test_of_several_the_first_is_delivered():
    with pytest.raises(Terminated), held_signals() as hold:
        for _ in range(3):  # a supervisor that repeats itself
            signal.raise_signal(signal.SIGTERM)
        assert hold.asked == signal.SIGTERM


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_what_came_to_another_process_is_delivered_where_it_is_ignored(number, raised):
    before = signal.signal(number, signal.SIG_IGN)  # as of a command that a script has put into the background
    try:
        with pytest.raises(raised), held_signals() as hold:
            hold.asked = number
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("first", STOPPING)
def test_ctrl_c_does_not_wait_behind_another_signal(first):
    with pytest.raises(KeyboardInterrupt) as caught, held_signals():
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")
    assert caught.value.__context__ is None


def test_a_signal_is_not_lost_to_an_error():
    """A diverged run is a result of a comparison, which would go on with the next one."""
    with pytest.raises(KeyboardInterrupt), held_signals():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("diverged")
    with pytest.raises(ValueError), held_signals():
        raise ValueError("diverged")


def test_a_handler_may_return():
    got = []
    signal.signal(signal.SIGTERM, lambda *_: got.append("noted"))
    with held_signals():
        signal.raise_signal(signal.SIGTERM)
        assert got == []
    assert got == ["noted"]


def test_what_is_ignored_stays_ignored():
    """A shell's background jobs are born with Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_signals() as hold:
        signal.raise_signal(signal.SIGINT)
    assert hold.asked is None and signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_another_thread_than_the_main_one_holds_nothing():
    seen = []

    def body():
        with held_signals() as hold:
            seen.append((is_holding(), hold.asked))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(False, None)]
