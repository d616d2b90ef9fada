"""The layout of devices: how items are shared out and stacked, where arrays lie, what is refused."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.config import EvaluateConfig, RunConfig, SearchConfig
from ragjax.errors import UserError
from ragjax.evaluation import evaluate_runs
from ragjax.exporting import export_run
from ragjax.parallel import (
    ONE_DEVICE,
    Layout,
    Replicated,
    device_kinds,
    idle_groups,
    join_copies,
    joining,
    layout_of,
    refuse_several_processes,
    stack_copies,
    stack_groups,
)
from ragjax.rates import search_rates
from ragjax.runs.run import _for_these_devices
from ragjax.training import STRATEGIES, train
from ragjax.training import run as run_module


class Made(NamedTuple):
    numbers: np.ndarray  # [size] padded with -1
    mask: np.ndarray  # [size]


def make(size: int):
    def of(items):
        numbers = np.full(size, -1, np.int32)
        numbers[: len(items)] = items
        return Made(numbers, np.arange(size) < len(items))

    return of


# --- sharing out


@pytest.mark.parametrize(
    ("batch_size", "devices", "micro_batches", "size"), [(4, 1, 1, 4), (5, 8, 1, 1), (9, 2, 2, 3), (8, 2, 2, 2)]
)
def test_a_micro_batch_is_as_small_as_it_can_be(batch_size, devices, micro_batches, size):
    assert layout_of(batch_size, micro_batches, devices) == Layout(devices, micro_batches, size)


def test_items_are_shared_out_in_their_order():
    assert Layout(2, 2, 2).split([0, 1, 2, 3, 4]) == [[0, 1], [2, 3], [4], []]
    assert Layout(1, 3, 1).split("ab") == ["a", "b", ""]


def test_groups_come_before_micro_batches_and_nothing_becomes_zeros():
    stacked = Layout(2, 2, 2).stack([10, 11, 12, 13, 14], make(2))
    np.testing.assert_array_equal(stacked.numbers, [[[10, 11], [12, 13]], [[14, -1], [0, 0]]])
    np.testing.assert_array_equal(stacked.mask, [[[1, 1], [1, 1]], [[1, 0], [0, 0]]])
    assert (stacked.numbers.dtype, stacked.mask.dtype) == (np.int32, bool)


def test_one_tree_for_each_group():
    stacked = stack_groups({2: {"a": np.full((2, 3), 1.5, np.float32)}, 0: {"a": np.full((2, 3), 2.5, np.float32)}}, 3)
    np.testing.assert_array_equal(stacked["a"], np.stack([np.full((2, 3), value) for value in (2.5, 0.0, 1.5)]))


@pytest.mark.parametrize(
    ("own", "numbers"),
    [((1,), [[[0, 0], [0, 0]], [[14, -1], [0, 0]]]), ((0,), [[[10, 11], [12, 13]], [[0, 0], [0, 0]]])],
)
def test_a_process_makes_the_batches_of_its_own_groups(own, numbers):
    layout = dataclasses.replace(Layout(2, 2, 2), own=own)
    made = []

    def counted(items):
        made.append(items)
        return make(2)(items)

    np.testing.assert_array_equal(layout.stack([10, 11, 12, 13, 14], counted).numbers, numbers)
    assert made == ([[14]] if own == (1,) else [[10, 11], [12, 13]])
    # One that has none of the questions still gives its devices something of the right shape.
    assert layout.cut(2).own == own
    assert layout.stack([10], counted).numbers.shape == (2, 2, 2)


def test_copies_stand_behind_their_group_and_come_back_in_the_order_of_the_items():
    layout, copies = Layout(2, 3, 2), range(4)
    batches = [layout.stack([100 * copy + item for item in range(11)], make(2)) for copy in copies]
    stacked = stack_copies(batches)
    assert stacked.numbers.shape == (2, 4, 3, 2)
    joined, mask = join_copies(stacked.numbers), join_copies(stacked.mask)
    np.testing.assert_array_equal(mask, np.tile(np.arange(12) < 11, (4, 1)))
    np.testing.assert_array_equal(joined[:, :11], [[100 * copy + item for item in range(11)] for copy in copies])


# --- placing and compiling, on one device and on eight


def add_up(reducer):
    def step(state, frozen, batch):
        total = reducer.sum(jnp.sum(batch * frozen))
        return state + total, {"total": total}

    return step


def sums(reducer):
    return lambda trainable, frozen, batch: reducer.sum(jnp.sum(batch * frozen + trainable))


def on_all_groups(groups: int) -> None:
    devices = Replicated()
    assert devices.groups == len(device_kinds()) == groups
    batch = np.arange(groups * 6, dtype=np.float32).reshape(groups, 2, 3)
    given = jnp.float32(1.0)
    frozen, state = devices.place(jnp.float32(2.0)), devices.place(given, donated=True)
    assert len(state.sharding.device_set) == groups
    state, metrics = devices.compile_step(add_up)(state, frozen, batch)
    # Numbers this small add up exactly in any order.
    assert float(metrics["total"]) == 2 * batch.sum() == float(state) - 1
    assert float(given) == 1.0  # its memory was not given away
    assert float(devices.compile_sums(sums)(given, frozen, batch)) == 2 * batch.sum() + batch.size
    own = devices.compile_map(lambda factor, own: own[:, 0] * factor)
    np.testing.assert_array_equal(own(frozen, batch), batch[..., 0] * 2)
    if groups == 1:
        alone, _ = jax.jit(add_up(ONE_DEVICE))(given, frozen, batch[0])
        assert float(alone) == float(state)


def test_one_group_is_the_step_by_itself():
    on_all_groups(1)


def test_eight_groups_add_up():
    code = "from tests.test_parallel import on_all_groups; on_all_groups(8)"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        check=True,
        timeout=300,
    )


def test_a_layout_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Layout(1, 1, 1).groups = 2


# --- meshes (tests/training/test_mesh.py trains on some)


@pytest.mark.parametrize(
    "text", ["fsdp", "fsdp=8", "rows:8", "fsdp:2,fsdp:4", "fsdp:0", "tensor:-2", "data:2;fsdp:4", "FSDP:8"]
)
def test_a_mesh_that_is_spelled_wrongly_is_refused(text):
    with pytest.raises(UserError, match=f"^--mesh={text} has the entry '.*': write each of the axes data, fsdp, "):
        RunConfig(parallelism="mesh", mesh=text)


def test_a_mesh_goes_with_its_parallelism():
    assert RunConfig(parallelism="mesh", mesh=" tensor:2, data:4").mesh_sizes == {"tensor": 2, "data": 4}
    with pytest.raises(UserError, match="^--mesh=fsdp:8 goes with --parallelism=mesh: give both, or leave it out.$"):
        RunConfig(mesh="fsdp:8")


def test_a_mesh_of_another_number_of_devices_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        train(RunConfig(parallelism="mesh", mesh="data:2,tensor:3"))
    assert str(caught.value) == (
        "--mesh=data:2,tensor:3 is a mesh of 6 devices, and there are 1 here: choose axes whose product is 1, such as "
        "fsdp:1."
    )


def test_fewer_questions_than_groups_are_refused(monkeypatch):
    monkeypatch.setattr(run_module, "arrangement_of", lambda config: SimpleNamespace(groups=8))
    config = RunConfig(parallelism="mesh", mesh="fsdp:8", batch_size=7)
    with pytest.raises(UserError) as caught:
        run_module.check_batches(config, STRATEGIES["joint"])
    assert str(caught.value) == (
        "--batch_size=7 is less than the 8 groups of the mesh (data times fsdp), each of which takes questions of its "
        "own in the phase joint: give 8 or more, or a wider tensor axis."
    )
    run_module.check_batches(dataclasses.replace(config, batch_size=8), STRATEGIES["joint"])


def test_what_was_trained_on_a_mesh_is_opened_on_one_device():
    config = RunConfig(parallelism="mesh", mesh="fsdp:8")
    assert _for_these_devices(config) == RunConfig()
    assert _for_these_devices(dataclasses.replace(config, mesh="fsdp:1")).parallelism == "mesh"


# --- several processes (tests/multiprocess/ has a real pair)


@pytest.fixture
def one_of_two(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)


@pytest.mark.parametrize(
    "command",
    [
        lambda: search_rates(RunConfig(), SearchConfig()),
        lambda: evaluate_runs(EvaluateConfig(), {}),
        lambda: export_run("run", "out"),
    ],
)
def test_one_of_several_processes_is_refused_before_anything_else(one_of_two, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        command()
    assert str(caught.value) == (
        "only ragjax.train runs in several processes, and this is one of 2: start it once, on one host; it uses all "
        "devices there."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_first_process_that_is_not_there_is_missed_in_one_sentence(monkeypatch):
    monkeypatch.setattr(joining, "_FOUND_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        joining._find(address)
    with pytest.raises(UserError) as caught:
        joining._find(address)
    assert str(caught.value) == (
        f"--coordinator_address={address}: nobody listens there ([Errno 111] Connection refused): start the first "
        "process, on that host and with that port, within some minutes of the others."
    )


def test_several_processes_have_a_mesh(one_of_two, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        train(RunConfig(run_dir="mine"))
    assert str(caught.value) == (
        "--parallelism=pmap is for the devices of one process: give --parallelism=mesh, and --mesh=data:1 where the "
        "weights fit on each device."
    )
    assert list(tmp_path.iterdir()) == []


def test_one_process_is_not_refused():
    refuse_several_processes()


@pytest.mark.parametrize(
    ("batch_size", "micro_batches", "devices", "idle"),
    [(4, 1, 8, 4), (8, 1, 8, 0), (12, 1, 8, 2), (9, 1, 8, 3), (16, 2, 8, 0), (4, 2, 8, 6), (4, 1, 1, 0), (5, 2, 1, 0)],
)
def test_groups_without_questions_are_counted(batch_size, micro_batches, devices, idle):
    """9 questions on 8 devices: two each, so five devices have some."""
    assert idle_groups(batch_size, micro_batches, devices) == idle
    layout = layout_of(batch_size, micro_batches, devices)
    filled = [bool(part) for part in layout.split(list(range(batch_size)))]
    by_group = [any(filled[g * micro_batches : (g + 1) * micro_batches]) for g in range(devices)]
    assert by_group.count(False) == idle
