"""Search on the accelerator against brute force in float64, on one device and on eight virtual ones."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ragjax.errors import UserError
from ragjax.retrieval import ArrayVectors, DeviceIndex, ExactIndex, device_index
from ragjax.retrieval.device_index import place_vectors
from tests.retrieval.cases import brute_force, queries_of, retrieve, unit
from tests.retrieval.device_worker import CASES, STEP_CASES, in_a_step, inputs, proposed


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    """What the worker has found."""
    path = tmp_path_factory.mktemp("devices") / "found.npz"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.retrieval.device_worker", str(path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return np.load(path)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("case", CASES)
def test_the_best_passages_are_proposed(case, devices, eight_devices):
    rows = eight_devices[case] if devices == 8 else proposed(case)
    vectors, asked = inputs(case)
    _, _, k, dtype = CASES[case]
    expected = brute_force(vectors, asked, k)[0]
    assert rows.dtype == np.int64
    if dtype == "float32":
        np.testing.assert_array_equal(rows, expected)
    else:  # more of them, in the order of rounded scores
        assert rows.shape == (len(asked), 4 * k + 32)
        assert all(
            len(set(one)) == len(one) and set(best) <= set(one) for one, best in zip(rows, expected, strict=True)
        )
        assert (rows[:, :k] != expected).any()


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("case", STEP_CASES)
def test_a_compiled_step_can_search(case, devices, eight_devices):
    """Of equal passages, which lie on several devices, the lower rows are found."""
    names = f"scores of {case}", f"rows of {case}"
    scores, rows = (eight_devices[name] for name in names) if devices == 8 else in_a_step(case)
    vectors, asked = inputs(case)
    expected, values = brute_force(vectors, 2 * asked, 3)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, values, rtol=1e-6)


def test_each_device_has_its_own_passages_and_they_stay_there(eight_devices):
    assert eight_devices["devices"] == [8]
    assert eight_devices["share"].tolist() == [3, 1, 16, 24]  # 301 passages in blocks of 16 on 8 devices
    assert eight_devices["gathers"].tolist() == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_retriever_over_it_equals_one_over_exact_search(dtype):
    rng = np.random.default_rng(0)
    vectors, asked = unit(rng, 2000, 32), unit(rng, 300, 32)  # more questions than are scored at once
    ours, theirs = (retrieve(index, vectors, asked, 7) for index in (DeviceIndex(vectors, dtype), ExactIndex(vectors)))
    np.testing.assert_array_equal(ours.passage_rows, theirs.passage_rows)
    np.testing.assert_array_equal(ours.scores, theirs.scores)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2.0**-8), ("int8", 1 / 254)])
def test_stored_vectors_are_the_nearest_that_the_type_has(dtype, bound):
    """bfloat16 keeps 8 bits; of int8 the scale is a 127th of the vector's largest number, and half of it is lost."""
    vectors = unit(np.random.default_rng(1), 50, 24) * np.linspace(0.01, 100, 50, dtype=np.float32)[:, None]
    vectors[7] = 0
    shards = place_vectors(ArrayVectors(vectors), dtype)
    stored = np.asarray(shards.vectors, np.float64)
    if dtype == "int8":
        assert np.asarray(shards.vectors).dtype == np.int8
        assert np.abs(np.delete(stored.reshape(50, 24), 7, axis=0)).max(axis=1).tolist() == [127] * 49
        stored = stored * np.asarray(shards.scales)[..., None]
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    assert (np.abs(stored.reshape(50, 24) - vectors) <= bound * largest * (1 + 1e-6)).all()


def test_the_approximate_top_k_is_one():
    """Off a TPU it is exact in each block; it proposes candidates as the rounded types do."""
    rng = np.random.default_rng(2)
    vectors, asked = unit(rng, 300, 16), unit(rng, 5, 16)
    index = DeviceIndex(vectors, recall=0.9)
    assert index.search(queries_of(asked), 3).passage_rows.shape == (5, 44)
    np.testing.assert_array_equal(retrieve(index, vectors, asked, 3).passage_rows, brute_force(vectors, asked, 3)[0])


def test_a_read_only_memory_map(tmp_path):
    vectors = unit(np.random.default_rng(1), 20, 4)
    np.save(tmp_path / "vectors.npy", vectors)
    index = DeviceIndex(np.load(tmp_path / "vectors.npy", mmap_mode="r"), "int8")
    found = retrieve(index, vectors, vectors[7:8], 1)
    assert found.passage_rows.tolist() == [[7]]
    assert found.cost.flops == 2 * 20 * 4


def test_vectors_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(device_index, "free_device_bytes", lambda: 1000)
    vectors = unit(np.random.default_rng(1), 20, 24)
    with pytest.raises(
        UserError, match=r"as float32, where 0.0 GB are free: choose --device_dtype=int8 or --search_on="
    ):
        DeviceIndex(vectors)
    DeviceIndex(vectors, "int8")  # 480 bytes
    with pytest.raises(UserError, match=r"as int8, where 0.0 GB are free: choose --search_on=host"):
        DeviceIndex(np.tile(vectors, (3, 1)), "int8")


def test_describe():
    vectors = unit(np.random.default_rng(1), 20, 24)
    described = {"type": "DeviceIndex", "dtype": "int8", "recall": 1.0, "devices": 1, "passages": 20, "width": 24}
    assert DeviceIndex(vectors, "int8").describe() == described | {"bytes": 20 * 24 + 20 * 4}


def test_shapes():
    eye = np.eye(3, dtype=np.float32)
    assert DeviceIndex(eye).search(queries_of(np.zeros((0, 3), np.float32)), 2).passage_rows.shape == (0, 2)
    for wrong in (np.zeros(3, np.float32), np.zeros((0, 3), np.float32), np.eye(3)):
        with pytest.raises(ValueError, match="vectors must be float32"):
            DeviceIndex(wrong)
