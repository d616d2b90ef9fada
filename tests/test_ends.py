"""How commands end, with a fault of each kind put in: one sentence, its exit code, and no traceback."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ragjax.commands import ends
from ragjax.errors import UserError
from ragjax.files import default_cache_dir, lock_file, take_lock
from ragjax.stopping import Terminated

TRAIN_FLAGS = {
    "batch_size": 8,
    "gradient_accumulation": 1,
    "remat": "partial",
    "quantize": "none",
    "lora_rank": 16,
    "eval_batch_size": 1,
}


def ended(capsys, fault, flags=None, resumes=True) -> tuple[int, str]:
    """(exit code, what is said) of a command that raises `fault`."""

    def body():
        raise fault

    code = ends.end_of(body, lambda: flags or {}, resumes)
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    return code, said.err


def raised_from(fault: Exception, cause: Exception) -> Exception:
    fault.__cause__ = cause
    return fault


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4294967296 bytes."),
        ValueError("RESOURCE_EXHAUSTED: Error loading program"),
        RuntimeError("Failed to allocate 17179869184 bytes"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        raised_from(KeyError("step"), MemoryError("std::bad_alloc")),
    ],
)
def test_what_takes_less_memory_is_named(capsys, fault):
    code, said = ended(capsys, fault, TRAIN_FLAGS)
    assert code == 1
    assert said.startswith("error: the memory was not enough (")
    assert re.search(r"\(\d+\.\d GB were free\)", said)
    for mend in ("lower --batch_size", "raise --gradient_accumulation", "--remat=full", "--quantize=nf4"):
        assert mend in said
    assert "eval_batch_size" not in said  # it is 1 already
    assert len(said.splitlines()) == 1


def test_only_flags_that_leave_room_are_named(capsys):
    small = {"batch_size": 1, "gradient_accumulation": 1, "remat": "full", "quantize": "none", "lora_rank": 0}
    assert "--" not in ended(capsys, MemoryError(), {})[1]
    said = ended(capsys, MemoryError(), small | {"top_k": 5})[1]
    assert "lower --top_k" in said
    assert not any(name in said for name in ("batch_size", "accumulation", "remat", "quantize"))


def test_a_full_disk_is_named_with_its_file(capsys):
    code, said = ended(capsys, OSError(errno.ENOSPC, "No space left on device", "/disk/file"))
    assert code == 1
    assert said.startswith("error: /disk/file could not be written (No space left on device): free some space")


def test_a_full_disk_is_no_want_of_memory(capsys):
    """As tensorstore reports it, which writes checkpoints."""
    text = 'RESOURCE_EXHAUSTED: Error writing "/disk/x": [OS error 28: No space left on device]'
    said = ended(capsys, ValueError(text), TRAIN_FLAGS)[1]
    assert said.startswith("error: what this command writes could not be written (No space left on device)")


def test_what_may_not_be_opened_is_named(capsys):
    code, said = ended(capsys, PermissionError(errno.EACCES, "Permission denied", "/disk/file"))
    assert (code, said) == (1, "error: /disk/file could not be opened (Permission denied): check its permissions.\n")


def test_a_sentence_stays_as_it_is_and_is_not_obeyed(capsys):
    assert ended(capsys, UserError("mend \x1b[2J it")) == (1, "error: mend \\x1b[2J it\n")
    assert ended(capsys, raised_from(RuntimeError("in a callback"), UserError("mend it"))) == (1, "error: mend it\n")


def test_ctrl_c_says_whether_the_command_continues(capsys):
    assert ended(capsys, KeyboardInterrupt()) == (130, "stopped; run the same command to continue\n")
    assert ended(capsys, KeyboardInterrupt(), resumes=False) == (130, "stopped\n")
    assert ended(capsys, Terminated()) == (143, "stopped by SIGTERM; run the same command to continue\n")


# A command that trains, inside something that takes minutes and gives Python no control. {holding} its signals.
BUSY = """
import contextlib, hashlib, signal, sys
from ragjax.commands import ends
from ragjax.stopping import held_signals

def body():
    ends.take_signals()
    with {holding}:
        print("busy", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(ends.end_of(body, dict, resumes=True))
"""


def test_a_second_ctrl_c_waits_for_nothing():
    command = [sys.executable, "-c", BUSY.format(holding="held_signals()")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "stopping when this step is saved; Ctrl-C then stops at once\n"
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    # Python itself may have got to the second one: on a busy machine the step has not begun yet.
    assert re.fullmatch(r"stopped( at once)?; run the same command to continue\n", errors)
    assert (process.returncode, out) == (130, "")


def test_sigterm_ends_a_command_that_trains_and_no_other():
    """The second one comes while the first is being obeyed."""
    raised = "signal.raise_signal(signal.SIGTERM)"
    script = BUSY.format(holding="contextlib.ExitStack() as stack")
    script = script.replace('print("busy", flush=True)', f"stack.callback(lambda: {raised}); {raised}")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (143, "stopped by SIGTERM; run the same command to continue\n")
    script = script.replace("ends.take_signals()", "pass")
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -signal.SIGTERM


def test_a_package_that_cannot_be_used_is_named(capsys):
    code, said = ended(capsys, ImportError("libfoo.so: wrong ELF class", name="faiss"))
    assert code == 1
    assert "a package that ragjax needs cannot be used (libfoo.so: wrong ELF class)" in said


def test_a_fault_of_ragjax_leaves_its_traceback_in_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, said = ended(capsys, IndexError("list index out of range"))
    (path,) = tmp_path.iterdir()
    assert code == 1
    assert f"ragjax has a fault (IndexError: list index out of range): its traceback is kept in {path}," in said
    text = path.read_text()
    assert "Traceback (most recent call last)" in text
    assert "in body" in text
    assert text.rstrip().endswith("IndexError: list index out of range")


def test_a_traceback_that_cannot_be_kept_is_shown(capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")

    def body():
        raise IndexError("out of range")

    assert ends.end_of(body, dict, resumes=False) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_pipe_that_nobody_reads_needs_no_word(capsys):
    assert ended(capsys, BrokenPipeError(errno.EPIPE, "Broken pipe")) == (141, "")


def piped(tail: str, *arguments: str, folder: Path, **environment: str) -> tuple[int, str]:
    """(exit code, stderr) of a command whose output goes to `tail`."""
    line = f'"{sys.executable}" {" ".join(arguments)} | {tail}; exit ${{PIPESTATUS[0]}}'
    environment = os.environ | {"RAGJAX_CACHE": str(folder)} | environment
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


def test_help_may_be_cut_off(tmp_path):
    # One process closes the pipe before the other has written all of it.
    assert piped("(exec 0<&-; sleep 0)", "-m", "ragjax.train", "--help", folder=tmp_path) == (141, "")


def test_what_cannot_be_printed_is_said(tmp_path):
    line = f'"{sys.executable}" -m ragjax.train --help > /dev/full'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: what this command writes could not be written (No space left on device)")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["cuda", "CPU"])
def test_a_platform_that_is_not_there_is_named(tmp_path, name):
    flags = ("-m", "ragjax.train", f"--run_dir={tmp_path / 'run'}")
    code, said = piped("cat", *flags, folder=tmp_path, JAX_PLATFORMS=name)
    assert code == 1
    assert f"error: JAX_PLATFORMS={name} asks for a platform that JAX cannot use here" in said
    assert "Traceback" not in said


def test_a_flag_that_is_not_there_is_one_sentence(tmp_path):
    code, said = piped("cat", "-m", "ragjax.train", "--batchsize=2", folder=tmp_path)
    assert code == 1
    assert said.startswith("error: Unknown command line flag 'batchsize'. Did you mean: batch_size ?")
    assert len(said.splitlines()) == 1


def test_without_a_home_the_cache_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("RAGJAX_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "ragjax"
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where neither HOME nor the user is known
    with pytest.raises(UserError, match="no home folder.*set RAGJAX_CACHE"):
        default_cache_dir()
    monkeypatch.setenv("RAGJAX_CACHE", "/somewhere")
    assert default_cache_dir() == Path("/somewhere")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_work_goes_on_where_there_are_no_locks(monkeypatch, tmp_path, capsys, code):
    def refuse(handle, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock_file(tmp_path / "lock", "waiting").close()
    assert f"warning: the file system has no locks ({os.strerror(code)})" in capsys.readouterr().err


def test_another_fault_of_a_lock_is_raised(monkeypatch, tmp_path):
    def refuse(handle, how):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Bad file descriptor"):
        take_lock(0, "held")
