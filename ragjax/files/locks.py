"""Locks between processes. They go with the process that holds them, however it ends.

Some file systems have none (NFS without its lock service, many a FUSE mount). Work goes on there with a warning: one
process alone needs no lock, and there may be no other disk.
"""

import errno
import fcntl
from pathlib import Path
from typing import BinaryIO

from ragjax.errors import UserError
from ragjax.voice import say, warn

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


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
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warn(f"the file system has no locks ({error.strerror}): let no other process work on the same folders")


def lock_file(path: Path, waiting: str) -> BinaryIO:
    """The file, made when missing and locked; `waiting` goes to stderr while another process has it.

    Closing the file gives the lock back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "wb")  # noqa: SIM115  the caller closes it
    take_lock(file.fileno(), waiting, wait=True)
    return file
