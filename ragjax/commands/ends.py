"""How a command ends: one sentence in place of what a library or the system raises, and its exit code.

    0      it did what was asked
    1      one sentence says what to mend; of a fault of ragjax's own, also where its traceback is kept
    130    Ctrl-C
    141    nobody reads what it prints any more (`| head`), which needs no word
    143    SIGTERM, of a command that trains: a machine that is taken away

What went wrong is found out from the exception alone, once it is there: a start that goes well pays nothing. A command
that trains saves its step first (`ragjax.stopping`); with `take_signals` a second Ctrl-C does not wait for that.
"""

import errno
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ragjax.commands.console import visible
from ragjax.errors import UserError, reason
from ragjax.stopping import Terminated, is_holding
from ragjax.version import __version__
from ragjax.voice import say

INTERRUPTED = 128 + 2  # as a shell reports a process that SIGINT has ended
UNREAD = 128 + 13  # and one that SIGPIPE has ended
TERMINATED = 128 + 15  # and one that SIGTERM has ended
_GOING_ON = "run the same command to continue"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_OUT_OF_MEMORY = re.compile(r"out of memory|bad_alloc|(?:cannot|failed to|unable to) allocate", re.IGNORECASE)
# What takes less memory: a flag, whether the flags leave room for that, and what to do.
_SAVINGS: tuple[tuple[str, Callable[[Mapping[str, Any]], bool], str], ...] = (
    ("batch_size", lambda flags: flags["batch_size"] > 1, "lower --batch_size"),
    (
        "gradient_accumulation",
        lambda flags: flags["gradient_accumulation"] < flags["batch_size"],
        "raise --gradient_accumulation",
    ),
    ("remat", lambda flags: flags["remat"] != "full", "give --remat=full"),
    ("quantize", lambda flags: flags["quantize"] == "none" and flags["lora_rank"] > 0, "give --quantize=nf4"),
    ("eval_batch_size", lambda flags: flags["eval_batch_size"] > 1, "lower --eval_batch_size"),
    ("top_k", lambda _: True, "lower --top_k"),
)


def end_of(body: Callable[[], None], flags: Callable[[], Mapping[str, Any]], resumes: bool) -> int:
    """Runs a command's body and says how it ended, if anything is to be said; its exit code.

    flags: the values of the command's flags by name, asked for when memory ran out.
    resumes: the command keeps what it has done, and continues from there when it is run again.
    """
    try:
        return _code_of(body)
    except BrokenPipeError:
        return UNREAD
    except KeyboardInterrupt:
        _say_at_end(f"stopped; {_GOING_ON}" if resumes else "stopped")
        return INTERRUPTED
    except Terminated:
        _say_at_end(f"stopped by SIGTERM; {_GOING_ON}")
        return TERMINATED
    except Exception as error:  # what libraries raise has no kind in common
        _say_at_end(f"error: {visible(_sentence(error, flags))}")
        return 1
    finally:
        _give_up_unwritable()


def leave_others(code: int) -> None:
    """Tells the other processes of a run, where there are any, that this one ends; where it ends badly, at once."""
    if (parallel := sys.modules.get("ragjax.parallel")) and parallel.end_watch(code):
        os._exit(code)


def take_signals() -> None:
    """Makes SIGTERM end a command as Ctrl-C does, and a second Ctrl-C end it at once.

    Python gets to handle a signal only when a step, or a compilation, gives control back to it. A thread hears of it
    before: the system's own handler writes the signal's number into a pipe.
    """
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_hear_interrupts, args=(reader,), daemon=True).start()


def _terminate(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # some send it again and again, also while the command ends
    raise Terminated


def _hear_interrupts(pipe: int) -> None:
    heard: list[int] = []
    while True:
        heard += os.read(pipe, 1)
        if heard.count(signal.SIGINT) == 2:
            _say_at_end(f"stopped at once; {_GOING_ON}")
            os._exit(INTERRUPTED)
        if len(heard) == 1 and is_holding():
            _say_at_end("stopping when this step is saved; Ctrl-C then stops at once")


def _code_of(body: Callable[[], None]) -> int:
    try:
        body()
        code = 0
    except SystemExit as end:  # absl's, after --help
        code = end.code if isinstance(end.code, int) else 0
    for stream in _streams():
        stream.flush()  # here a pipe that is closed can still be met quietly
    return code


def _streams() -> list[Any]:
    """Standard output and error, where the process has them."""
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]


def _give_up_unwritable() -> None:
    """Drops what cannot be written: Python would try it again when it ends, and complain."""
    for stream in _streams():
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say_at_end(sentence: str) -> None:
    try:
        say(sentence, to_stderr=True, everywhere=True)
    except OSError:  # nobody can read it
        _give_up_unwritable()


def _sentence(error: Exception, flags: Callable[[], Mapping[str, Any]]) -> str:
    if parallel := sys.modules.get("ragjax.parallel"):
        parallel.wait_for_word()
    for each in _causes(error):
        if isinstance(each, UserError):
            return str(each)
        if fault := _full_disk(each):  # asked first: tensorstore calls this RESOURCE_EXHAUSTED too
            name = getattr(each, "filename", None) or "what this command writes"
            return f"{name} could not be written ({fault}): free some space or choose another folder."
        if _is_out_of_memory(each):
            return _memory_sentence(flags())
        if isinstance(each, OSError) and each.errno in _DENIED and each.filename:
            return f"{each.filename} could not be opened ({each.strerror}): check its permissions."
        if isinstance(each, ImportError) and not (each.name or "ragjax").startswith("ragjax"):
            return f"a package that ragjax needs cannot be used ({reason(each)}): install ragjax anew."
    return _platform_sentence() or _bug_sentence(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and, one after another, what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _full_disk(error: BaseException) -> str | None:
    """The system's words for it; None where the error is another one."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in _FULL else None
    return next((words for words in map(os.strerror, _FULL) if words in str(error)), None)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # XLA's errors change their type from version to version, not this word.
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or (isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(text)))


def _memory_sentence(flags: Mapping[str, Any]) -> str:
    mends = [mend for name, has_room, mend in _SAVINGS if name in flags and has_room(flags)]
    *first, last = mends or ["free some, or use a machine with more"]
    way = f"{', '.join(first)} or {last}" if first else last
    if "batch_size" in flags:
        way += ", with another --run_dir where this one has begun"
    return f"the memory was not enough{_free_memory()}: {way}."


def _free_memory() -> str:
    try:
        from ragjax.costs import free_memory_bytes
        from ragjax.parallel import free_device_bytes

        device, host = free_device_bytes(), free_memory_bytes()
    except Exception:  # there may be none left to find out with
        return ""
    free, where = (host, "") if device is None else (device, " on the device")
    return "" if free is None else f" ({free / 1e9:.1f} GB were free{where})"


def _platform_sentence() -> str | None:
    """What keeps JAX from starting, if anything does."""
    try:
        from ragjax.parallel import check_platform

        check_platform()
    except UserError as error:
        return str(error)
    except Exception:  # not even imported: a fault of another kind
        return None
    return None


def _bug_sentence(error: Exception) -> str:
    trace = "".join(traceback.format_exception(error))
    text = f"ragjax {__version__}, Python {sys.version}\n{' '.join(sys.argv)}\n\n{trace}"
    what = f"ragjax has a fault ({type(error).__name__}: {reason(error)})"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="ragjax-fault-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(text)
    except OSError:
        return f"{what}: report it with this\n{text}"
    return f"{what}: its traceback is kept in {file.name}, please report it with that file."
