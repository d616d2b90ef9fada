"""Vectors on several devices are those of one. How texts become vectors: tests/test_pretrained.py."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.tiny import write_tiny_bert


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
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


def test_eight_devices_give_the_vectors_of_one(vectors):
    assert vectors["devices"] == 8
    for size in (3, 64):
        np.testing.assert_allclose(vectors[f"eight {size}"], vectors["one"], atol=1e-6, rtol=0)
    np.testing.assert_allclose(vectors["eight, few"], vectors["one"][:2], atol=1e-6, rtol=0)
    apart = np.abs(vectors["one"][:, None] - vectors["one"][None]).max(axis=-1)
    assert apart[~np.eye(len(apart), dtype=bool)].min() > 1e-4  # a wrong order would show
