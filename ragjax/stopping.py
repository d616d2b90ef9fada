"""Signals that stop a process, held back while something has to be brought to its end: a step and its checkpoint.

SIGTERM is also how a machine that is taken away says so: a cluster's schedulers send it, and JAX's own preemption
notice, which hosts that `jax.distributed` has joined agree on, is nothing else.
"""

import contextlib
import signal
import threading
from collections.abc import Generator
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT: what catches errors lets it pass."""


class Hold:
    """Signals that are held back."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the first that has come, here or to another process of the run


_holds: list[Hold] = []


def _raise(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def is_holding() -> bool:
    """Whether a signal would be held back now."""
    return bool(_holds)


@contextlib.contextmanager
def held_signals() -> Generator[Hold, None, None]:
    """Inside, SIGINT and SIGTERM are noted in the hold, for the body to come to its end soon; then they are delivered.

    They go to whoever handled them before: Python raises KeyboardInterrupt, a command says how it ends, and where
    nobody does, the process ends. The caller must be ready to go on, should a handler return. A SIGINT is not held back
    where a signal is waiting already. In other threads than the main one, which gets none, nothing is held.
    """
    hold = Hold()
    if threading.current_thread() is not threading.main_thread():
        yield hold
        return
    handlers = {int(number): signal.getsignal(number) for number in STOPPING}
    # What is ignored stays so, and what was not set from Python could not be set again.
    before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def deliver(number: int) -> None:
        hold.asked = None
        handler = before.get(number, _raise)  # one that is ignored here may have come to another process
        if callable(handler):
            handler(number, None)
        else:
            signal.raise_signal(number)

    def note(number: int, _: FrameType | None) -> None:
        if hold.asked is not None and number == signal.SIGINT:
            give_back()
            deliver(number)
        else:
            hold.asked = hold.asked or number

    for number in before:
        signal.signal(number, note)
    _holds.append(hold)
    try:
        yield hold
    finally:
        _holds.remove(hold)
        give_back()
        if hold.asked is not None:
            deliver(hold.asked)
