"""Machines by name."""

import re

import jax
import pytest

from ragjax.config import DryRunConfig, RunConfig
from ragjax.dry_run import dry_run, machines
from ragjax.dry_run.machines import machine_here, read_machine
from ragjax.errors import UserError


@pytest.fixture(autouse=True)
def no_fractions(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "count", "usable"),
    [
        ("8xa10", 8, 18e9),
        ("8 x A10", 8, 18e9),
        ("8xh100", 8, 60e9),
        ("1xa100-40", 1, 30e9),
        ("v5e-64", 64, 16e9),
        ("64xv5e", 64, 16e9),
        ("v5p-64", 32, 95e9),  # 64 cores, two to a device
        ("v6e-8", 8, 32e9),
    ],
)
def test_a_name_says_how_many_devices_and_what_each_has(text, count, usable):
    machine = read_machine(text)
    assert (machine.count, machine.usable, machine.is_named) == (count, usable, True)


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_what_jax_takes_of_a_gpu_is_as_it_is_told(monkeypatch, name):
    monkeypatch.setenv(name, "0.92")
    assert read_machine("8xa10").usable == pytest.approx(0.92 * 24e9)
    assert read_machine("v5e-4").usable == 16e9
    monkeypatch.setenv(name, "most")
    with pytest.raises(UserError, match=f"{name}=most is not a number"):
        read_machine("8xa10")


@pytest.mark.parametrize("text", ["a10", "0xa10", "8xgtx", "v9-8", "v5e", "8xa10x2", "x", "v4-1"])
def test_other_names_are_refused(text):
    with pytest.raises(UserError, match=re.escape(f"--devices={text} is not known: write a number and a device")):
        read_machine(text)


def test_the_devices_here_share_the_memory_of_the_host(monkeypatch):
    monkeypatch.setattr(machines, "free_memory_bytes", lambda: 12_000)
    monkeypatch.setattr(machines, "device_count", lambda: 4)
    machine = machine_here()
    assert (machine.count, machine.usable, machine.is_named) == (4, 3000, False)


def test_a_process_that_has_used_its_devices_is_told_so():
    assert jax.local_device_count() < 64
    with pytest.raises(UserError, match="start a process of its own"):
        dry_run(RunConfig(), "v5e-64")
    assert not jax.config.jax_platforms or "cpu" in jax.config.jax_platforms


def test_devices_by_name_are_for_a_dry_run_alone():
    with pytest.raises(UserError, match=re.escape("--devices=8xa10 goes with --dry_run")):
        DryRunConfig(devices="8xa10")
    assert DryRunConfig(dry_run=True, devices="8xa10").devices == "8xa10"
