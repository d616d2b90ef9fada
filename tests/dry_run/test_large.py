"""LLaMA-3-8B on machines that are not here: the training step really compiled, in a process for each."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

LLAMA = ("--generator=llama3-8b", "--dtype=bfloat16")
MESH = "--parallelism=mesh"


def try_out(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ragjax.train", "--dry_run", "--data=none", *LLAMA, *flags]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)


def gigabytes(printed: str, part: str) -> list[float]:
    """Of each phase."""
    return [float(value) for value in re.findall(rf"^  {part} +([\d.]+) GB", printed, re.MULTILINE)]


# 6.98e9 weights in the layers' kernels, 1.05e9 in the embeddings and the head, 22.7e6 in MiniLM.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "parameters", "optimizer"),
    [
        # nf4 takes 0.5625 bytes a weight; what is trained are MiniLM and 42e6 weights of adapters, two moments each.
        (("--devices=8xa10", "--quantize=nf4", "--batch_size=8"), 6.98 * 0.5625 + 1.05 * 2 + 0.09, 8 * 0.0646),
        (("--devices=v5e-64", MESH, "--lora_rank=0", "--batch_size=64"), 8.05 * 4 / 64, 8.05 * 8 / 64),
    ],
    ids=["qlora", "full"],
)
def test_a_step_fits(tmp_path, flags, parameters, optimizer):
    done = try_out(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert ": fits" in done.stdout
    assert gigabytes(done.stdout, "parameters") == [pytest.approx(parameters, abs=0.02)]
    assert gigabytes(done.stdout, "optimizer") == [pytest.approx(optimizer, abs=0.02)]


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_would(tmp_path):
    """In bfloat16, whole weights on each device: what would fit is compiled as well."""
    done = try_out(tmp_path, "--devices=8xa10", "--batch_size=8")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("8xa10 has 18.0 GB: --parallelism=mesh --mesh=fsdp:8 would fit.")
