"""Locks between processes. They go with the process that holds them, however it ends."""

import fcntl
from pathlib import Path
from typing import BinaryIO

from ragjax.errors import UserError
from ragjax.voice import say


def take_lock(handle: int, held: str, *, wait: bool = False) -> None:
    """Locks an open file or folder for this process alone, until the handle is closed.

    held: what to say where another process has it.
    wait: then wait until it is free, instead of raising UserError.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise UserError(held) from None
        say(held, to_stderr=True)
        fcntl.flock(handle, fcntl.LOCK_EX)


def lock_file(path: Path, waiting: str) -> BinaryIO:
    """The file, made when missing and locked; `waiting` goes to stderr while another process has it.

    Closing the file gives the lock back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "wb")  # noqa: SIM115  the caller closes it
    take_lock(file.fileno(), waiting, wait=True)
    return file
