"""A run of two processes with two virtual devices each: a signal to one stops both, the death of one ends the other,
and what they go on to make is what one process makes on four devices.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ragjax.files import read_json
from ragjax.runs import RunFolder, read_phases
from tests.multiprocess.test_pair import ends, free_port
from tests.tiny_runs import World, flat, read_lines, run_flags, tiny_world

pytestmark = pytest.mark.slow  # seven processes, each of which imports everything

# Runs `ragjax.train`. Where it is told so, it gets a signal when it has come to a step of a phase.
TOLD = """
import os, runpy, sys

number, phase, step, *sys.argv[1:] = sys.argv[1:]
import ragjax.training.loop
advance = ragjax.training.loop.Trainer.advance

def advance_and_get_it(self):
    result = advance(self)
    if (self._phase.name, str(self.step)) == (phase, step):
        os.kill(os.getpid(), int(number))
    return result

ragjax.training.loop.Trainer.advance = advance_and_get_it
runpy.run_module("ragjax.train", run_name="__main__", alter_sys=True)
"""
NOTHING = ("0", "", "")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


def flags(world: World, folder: Path) -> list[str]:
    values = {"strategy": "two_phase", "parallelism": "mesh", "mesh": "data:2,fsdp:2", "keep": "best", "dev_every": 1}
    values |= {"refresh_passages": 2}
    config = world.config(folder, **values, batch_size=5, max_steps=3, checkpoint_every=1, eval_limit=3)
    return run_flags(config)


def run(world: World, folder: Path, processes: int, told: tuple[str, str, str] = NOTHING) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each process; the last is told to get a signal."""
    address = f"127.0.0.1:{free_port()}"
    xla_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={4 // processes}"
    started = []
    for number in range(processes):
        own = [f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={number}"]
        signals = told if number == processes - 1 else NOTHING
        command = [sys.executable, "-c", TOLD, *signals, *flags(world, folder), *(own if processes > 1 else [])]
        started.append(
            subprocess.Popen(
                command,
                cwd=world.folder,
                env=world.environment() | {"XLA_FLAGS": xla_flags, "JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return ends(started, timeout=600)


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """The folder of a run of one process."""
    folder = world.folder / "one process"
    ((status, _, err),) = run(world, folder, 1)
    assert status == 0, err
    return folder


@pytest.fixture(scope="module")
def shared(world) -> Path:
    """That of a run of two, which was stopped twice."""
    folder = world.folder / "two processes"
    first, second = run(world, folder, 2, told=(str(int(signal.SIGTERM)), "generator", "2"))
    for status, _, err in (first, second):
        assert status == 143, first[2] + second[2]
        assert "stopped by SIGTERM; run the same command to continue" in err
    assert read_lines(folder / "metrics.jsonl")[-1]["step"] == 2

    first, second = run(world, folder, 2, told=(str(int(signal.SIGKILL)), "retriever", "1"))
    assert second[0] == -signal.SIGKILL
    assert first[0] == 1, first[2]
    last = [line for line in first[2].splitlines() if "error" in line]
    assert last == [
        "error: process 1 of 2 has ended, and this one with it: see what that one said; the same commands on all hosts "
        "continue."
    ]

    first, second = run(world, folder, 2)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "two_phase (rag_token), 3 test questions" in first[1]
    assert second[1] == ""
    return folder


def test_two_processes_make_what_one_makes(whole, shared):
    one, two = read_lines(whole / "metrics.jsonl"), read_lines(shared / "metrics.jsonl")
    assert [(line["phase"], line["step"]) for line in one] == [(line["phase"], line["step"]) for line in two]
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {"phase"}:
            np.testing.assert_allclose(left[name], right[name], rtol=1e-4, atol=1e-6, err_msg=name)

    phases = read_json(whole / "config.json")["phases"]
    for left, right in zip(*(read_phases(RunFolder(folder), phases) for folder in (whole, shared)), strict=True):
        assert left.step == right.step
        for name, leaf in flat(left.trained).items():
            if name.endswith("key/bias"):  # its gradient is zero, of whose rounding Adam makes steps
                continue
            other = flat(right.trained)[name]
            assert np.linalg.norm(leaf - other) <= 1e-4 * np.linalg.norm(leaf), name

    for moment in ("before", "after"):
        one, two = (read_lines(folder / "predictions" / f"test.{moment}.jsonl") for folder in (whole, shared))
        for left, right in zip(one, two, strict=True):
            assert left["prediction"] == right["prediction"]
            assert [each["id"] for each in left["passages"]] == [each["id"] for each in right["passages"]]

    costs = [read_json(folder / "summary.json")["cost"] for folder in (whole, shared)]
    for part in ("embedder", "generator", "search"):
        for unit in ("flops", "tokens"):
            assert costs[0][part][unit] == pytest.approx(costs[1][part][unit], rel=1e-6), (part, unit)


def test_the_first_alone_writes_the_run(whole, shared):
    names = [{path.name for path in folder.iterdir()} for folder in (whole, shared)]
    assert names[0] == names[1]
    # Keys name the tuned generator, which is another one in the last bits.
    one, two = (read_lines(folder / "likelihoods.jsonl") for folder in (whole, shared))
    for left, right in zip(one, two, strict=True):
        for values, others in zip(left.values(), right.values(), strict=True):
            np.testing.assert_allclose(values, others, rtol=1e-4)
    assert len(os.listdir(shared / "tensorboard" / "generator")) == 3  # one writer for each time that it was started
