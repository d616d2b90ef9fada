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
    # bfloat16 is rounded where it is written, as accelerators do.
    exact = "--xla_allow_excess_precision=false"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {quick} {exact} --xla_force_host_platform_device_count=8"
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
    ("case", "mesh", "wanted"),
    [
        ("joint", "all", "pmap"),
        ("full", "fsdp", "one"),
        ("nf4", "all", "one"),
        ("copies", "all", "one"),
    ],
)
def test_steps_on_a_mesh_end_in_the_same_parameters(results, case, mesh, wanted):
    found = part(results, f"{case} {mesh} ")
    found.pop("gathered", None)
    assert_alike(found, part(results, f"{case} {wanted} "))


def test_devices_send_each_other_weights_and_no_states(results):
    """What is gathered in a step has two dimensions, as a layer's kernels have, and no axis of questions or tokens."""
    shapes = [[int(width) for width in text.split(",")] for text in results["joint all gathered"]]
    assert shapes
    widths = {2, 3, 4, 8, 12, 16, 24, 32, 53, 61}  # of the two models, whole or cut by tensor:2
    for shape in shapes:
        assert len([width for width in shape if width > 1]) <= 2 and set(shape) <= widths | {1}, shape


def test_copies_differ_by_their_rates(results):
    kernel = results["copies all parameter embedder/params/encoder/layer/attention/self/query/kernel"]
    assert not np.allclose(kernel[0], kernel[1], atol=1e-4)


def test_neither_devices_nor_their_order_decide_a_sign(results):
    """Gradient sums rounded to bfloat16 would flip the first step of adapters that begin at zero."""
    found, wanted = part(results, "adam permuted parameter"), part(results, "adam one parameter")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, rtol=0, err_msg=name)
    assert all(np.abs(value).max() > 9e-4 for name, value in wanted.items() if "lora_b" in name)
    assert_alike(part(results, "adam permuted moment"), part(results, "adam one moment"))


def test_a_run_goes_on_where_there_are_other_devices(results):
    trained = part(results, "run trained ")
    wanted = part(results, "run all ")
    for where in ("pmap", "fsdp"):
        found = part(results, f"run {where} ")
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert trained and results["run all step"] == 1
    for name, value in trained.items():
        np.testing.assert_array_equal(wanted[f"trainable/{name}"], value, err_msg=name)
    shares = {where: results[f"run moment's share {where}"].tolist() for where in ("pmap", "all", "fsdp")}
    assert {where: whole // own for where, (own, whole) in shares.items()} == {"pmap": 1, "all": 2, "fsdp": 1}


def test_a_dry_run_knows_what_lies_on_a_device(results):
    """Weights, optimizer and what is trained, for every arrangement; and what replicated devices add up."""
    for where in ("pmap", "all", "fsdp"):
        np.testing.assert_array_equal(results[f"run planned {where}"], results[f"run placed {where}"], err_msg=where)
    gradients = results["run placed pmap"][2]
    assert gradients < results["run summed"] < gradients + 100  # bytes: some figures besides


def test_weights_are_loaded_into_their_shares_and_answer_as_they_lie(results):
    found, wanted = part(results, "run loaded sharded "), part(results, "run loaded whole ")
    assert found.keys() == wanted.keys() and found
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    own, whole = results["run share"]
    assert own * 4 == whole  # fsdp and tensor cut it, data does not
    np.testing.assert_array_equal(results["run answers sharded"], results["run answers whole"])
