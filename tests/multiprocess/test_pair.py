"""Two real processes that JAX has joined: every command refuses them, and the first alone speaks."""

import os
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # two processes, each of which imports everything

# Joins the other process, speaks, tries what the commands call, and ends as a command.
JOINED = """
import runpy, sys

import jax

port, number = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(number))
assert (jax.process_count(), jax.process_index()) == (2, int(number))

from ragjax.config import EvaluateConfig, RunConfig, SearchConfig
from ragjax.errors import UserError
from ragjax.evaluation import evaluate_runs
from ragjax.exporting import export_run
from ragjax.files import write_json
from ragjax.rates import search_rates
from ragjax.voice import progress, say

say(f"process {number} says this")
with progress(total=1, desc=f"bar of {number}", unit="step") as bar:
    bar.update()
write_json(f"written_by_{number}.json", number)
for try_it in (
    lambda: search_rates(RunConfig(run_dir="mine"), SearchConfig()),
    lambda: evaluate_runs(EvaluateConfig(embedder="minilm", out="mine"), {}),
    lambda: export_run("mine", "exported"),
):
    try:
        try_it()
    except UserError as error:
        print(f"refused: {error}", file=sys.stderr)
sys.argv = ["ragjax.train", "--run_dir=mine"]
runpy.run_module("ragjax.train", run_name="__main__", alter_sys=True)
"""
REFUSAL = "ragjax runs in one process, and this is one of 2: start it once, on one host; it uses all devices there."


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_pair(folder) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of both."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED, port, str(number)],
            cwd=folder,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "RAGJAX_CACHE": str(folder.parent / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def test_a_pair_is_refused_and_only_the_first_speaks_and_writes(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    first, second = run_pair(folder)
    for status, _, err in (first, second):
        assert status == 1, err
        lines = [line for line in err.splitlines() if REFUSAL in line]
        assert lines == [f"refused: {REFUSAL}"] * 3 + [f"error: {REFUSAL}"]
        assert "Traceback" not in err
    assert (first[1], second[1]) == ("process 0 says this\n", "")
    assert "bar of 0" in first[2] and "bar of" not in second[2]
    assert [path.name for path in folder.iterdir()] == ["written_by_0.json"]
