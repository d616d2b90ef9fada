"""Training on a mesh gives what one device gives: eight virtual CPU devices, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import write_tiny_bert, write_tiny_llama
from tests.tiny_runs import passages, questions, write_data


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("mesh")
    write_tiny_bert(folder / "bert")
    write_tiny_llama(folder / "llama")
    write_data(folder / "data", passages(), questions())
    # Nearly all of its time is compiling, and what is compared does not depend on how well that optimises.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {quick} --xla_force_host_platform_device_count=8"
    out = folder / "results.npz"
    subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.training.mesh_worker", str(out), str(folder)],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "RAGJAX_CACHE": str(folder / "cache")},
        check=True,
        timeout=900,
    )
    with np.load(out) as found:
        return dict(found)


def part(results: dict[str, np.ndarray], start: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(start): value for name, value in results.items() if name.startswith(start)}


def assert_alike(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """To 1e-5 of each leaf's norm."""
    assert found.keys() == wanted.keys() and found
    for name, value in wanted.items():
        assert np.linalg.norm(found[name] - value) <= 1e-5 * np.linalg.norm(value), name


@pytest.mark.parametrize(
    ("case", "name"),
    [("lora", "pmap"), ("lora", "fsdp"), ("lora", "all"), ("full", "all"), ("nf4", "all"), ("int8", "fsdp")],
)
def test_five_steps_end_in_the_parameters_of_one_device(results, case, name):
    assert_alike(part(results, f"{case} {name} "), part(results, f"{case} one "))


def test_copies_at_several_rates_end_in_the_same_parameters(results):
    found = part(results, "copies all ")
    assert_alike(found, part(results, "copies pmap "))
    kernel = found["parameter embedder/params/encoder/layer/attention/self/query/kernel"]
    assert not np.allclose(kernel[0], kernel[1], atol=1e-4)


def test_the_order_of_the_devices_decides_no_sign(results):
    """Gradient sums rounded to bfloat16 would flip the first step of adapters that begin at zero."""
    found, wanted = part(results, "adam permuted "), part(results, "adam in order ")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, rtol=0, err_msg=name)
    assert any(np.abs(value).max() > 9e-4 for name, value in wanted.items() if "lora_b" in name)


def test_a_run_goes_on_where_there_are_other_devices(results):
    found, wanted = part(results, "run moves "), part(results, "run stays ")
    assert found.keys() == wanted.keys() and found
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, rtol=0, err_msg=name)


def test_weights_are_loaded_into_their_shares_and_answer_as_they_lie(results):
    found, wanted = part(results, "run loaded sharded "), part(results, "run loaded whole ")
    assert found.keys() == wanted.keys() and found
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    own, whole = results["run share"]
    assert own * 4 == whole  # fsdp and tensor cut it, data does not
    np.testing.assert_array_equal(results["run answers sharded"], results["run answers whole"])
