"""Vectors and answers on several devices are those of one. How texts become vectors: tests/test_pretrained.py; what the
answers ought to be: tests/generation."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.tiny import write_tiny_bert


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    write_tiny_bert(folder / "bert")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.devices_worker", str(folder / "out.npz"), str(folder / "bert")],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    with np.load(folder / "out.npz") as found:
        return dict(found)


def test_eight_devices_give_the_vectors_of_one(results):
    assert results["devices"] == 8
    for size in (3, 64):
        np.testing.assert_allclose(results[f"eight {size}"], results["one"], atol=1e-6, rtol=0)
    np.testing.assert_allclose(results["eight, few"], results["one"][:2], atol=1e-6, rtol=0)
    apart = np.abs(results["one"][:, None] - results["one"][None]).max(axis=-1)
    assert apart[~np.eye(len(apart), dtype=bool)].min() > 1e-4  # a wrong order would show


@pytest.mark.parametrize("decoding", ["concat", "sampled", "rag_token", "rag_sequence"])
def test_eight_devices_give_the_answers_of_one(results, decoding):
    one, eight = (results[f"{decoding} {many} tokens"] for many in ("one", "eight"))
    np.testing.assert_array_equal(eight, one)
    assert len({tuple(answer) for answer in one.tolist()}) > 10  # answers on wrong places would show
    numbers = [results[f"{decoding} {many} numbers"] for many in ("one", "eight")]
    np.testing.assert_allclose(*numbers, rtol=1e-5)


def test_every_device_takes_part_in_decoding(results):
    assert results["devices that read"] == 8
    np.testing.assert_array_equal(results["copies"], [8, True])
