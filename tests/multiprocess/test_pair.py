"""Two real processes that JAX has joined: what they exchange, what refuses them, and that the first alone speaks."""

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

import numpy as np

from ragjax.config import EvaluateConfig, RunConfig, SearchConfig
from ragjax.errors import UserError
from ragjax.evaluation import evaluate_runs
from ragjax.exporting import export_run
from ragjax.files import write_json
from ragjax.parallel import largest_of_all, same_for_all, share_out, wait_for_all
from ragjax.rates import search_rates
from ragjax.voice import progress, say

say(f"process {number} says this")
with progress(total=1, desc=f"bar of {number}", unit="step") as bar:
    bar.update()
write_json(f"written_by_{number}.json", number)

asked = []
def doubled(part):
    asked.append(part)
    items = np.arange(5)[part]
    return 2**40 * items, np.stack([items, -items], 1) / 7.0, items.astype(np.float32)
large, pairs, small = share_out(doubled, 5)
assert asked == [slice(0, 3) if number == "0" else slice(3, 5)]
np.testing.assert_array_equal(large, 2**40 * np.arange(5), strict=True)  # JAX itself has no such numbers
np.testing.assert_array_equal(pairs, np.stack([np.arange(5), -np.arange(5)], 1) / 7.0, strict=True)
np.testing.assert_array_equal(small, np.arange(5, dtype=np.float32), strict=True)
(none_for_the_second,) = share_out(lambda part: [np.arange(1)[part]], 1)
assert none_for_the_second.tolist() == [0]
assert largest_of_all(int(number) + 3) == 4
assert same_for_all("alike") and not same_for_all(f"of {number}")
wait_for_all("here")

for try_it in (
    lambda: search_rates(RunConfig(run_dir="mine"), SearchConfig()),
    lambda: evaluate_runs(EvaluateConfig(embedder="minilm", out="mine"), {}),
    lambda: export_run("mine", "exported"),
):
    try:
        try_it()
    except UserError as error:
        print(f"refused: {error}", file=sys.stderr)
sys.argv = ["ragjax.train", "--parallelism=mesh", f"--run_dir=of-{number}"]
runpy.run_module("ragjax.train", run_name="__main__", alter_sys=True)
"""
REFUSAL = (
    "only ragjax.train runs in several processes, and this is one of 2: start it once, on one host; it uses all "
    "devices there."
)
NOT_SHARED = "is not the same folder for all processes: choose one on a file system that all hosts share."


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
    return ends(processes, timeout=300)


def ends(processes: list[subprocess.Popen], timeout: float) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *map(said, output)) for process, output in zip(processes, outputs, strict=True)]


def said(text: str) -> str:
    """Without what gloo, which joins CPUs, prints itself, several threads at once."""
    return "".join(line for line in text.splitlines(keepends=True) if "[Gloo]" not in line and "peer ranks" not in line)


def test_a_pair_is_refused_and_only_the_first_speaks_and_writes(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    first, second = run_pair(folder)
    for status, _, err in (first, second):
        assert status == 1, err
        lines = [line for line in err.splitlines() if "refused" in line or "error" in line]
        assert lines[:3] == [f"refused: {REFUSAL}"] * 3
        assert len(lines) == 4
        assert lines[3].startswith("error: --run_dir=") and lines[3].endswith(NOT_SHARED)
        assert "Traceback" not in err
    assert (first[1], second[1]) == ("process 0 says this\n", "")
    assert "bar of 0" in first[2] and "bar of" not in second[2]
    assert {path.name for path in folder.iterdir()} == {"written_by_0.json", "of-0"}
    assert [path.name for path in (folder / "of-0").iterdir()] == [".lock"]
