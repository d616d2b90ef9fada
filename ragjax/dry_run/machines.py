"""Machines by name: how many devices there are, and what each of them holds.

Notable choices
- Memory is that of the makers' pages: NVIDIA's data sheets, Google Cloud's pages on each TPU version. A GB is taken as
  1e9 bytes, the smaller of its two readings.
- Of a GPU JAX takes three quarters, unless XLA_CLIENT_MEM_FRACTION or its older name says otherwise. That is what a
  step can use.
"""

import math
import os
import re
from typing import NamedTuple

from ragjax.costs import free_memory_bytes
from ragjax.errors import UserError
from ragjax.parallel import device_count, device_kinds, free_device_bytes

_GPU_GB = {
    "t4": 16,
    "v100": 32,
    "rtx3090": 24,
    "rtx4090": 24,
    "a10": 24,
    "l4": 24,
    "a100-40": 40,
    "l40s": 48,
    "a100": 80,
    "h100": 80,
    "h200": 141,
}
_TPU_GB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
# Clouds count the cores of these in the name of a slice, two to a device.
_CORES = {"v4": 2, "v5p": 2}
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_DEFAULT_FRACTION = 0.75


class Machine(NamedTuple):
    """Devices of one kind."""

    name: str
    count: int
    usable: float  # bytes of each that a program can have; infinite where nothing tells
    remark: str  # how that follows from what the device has
    is_named: bool  # or these are the devices here


def read_machine(text: str) -> Machine:
    """The machine that a text such as "8xa10" or "v5e-64" names.

    Raises:
      UserError: it is not written so, or names no device of the tables.
    """
    count, kind = _split(text.replace(" ", "").lower())
    if count < 1 or kind not in (*_GPU_GB, *_TPU_GB):
        raise UserError(
            f"--devices={text} is not known: write a number and a device, as in 8xa10 or v5e-64, with one of "
            f"{', '.join((*_GPU_GB, *_TPU_GB))}."
        )
    if kind in _TPU_GB:
        return Machine(text, count, _TPU_GB[kind] * 1e9, "all of it", is_named=True)
    fraction, source = _fraction()
    size = _GPU_GB[kind]
    return Machine(text, count, fraction * size * 1e9, f"{fraction:g} of {size} GB, {source}", is_named=True)


def _split(text: str) -> tuple[int, str]:
    """(devices, their kind); 0 of no kind where it is not written so."""
    if found := re.fullmatch(r"(\d+)x(.+)", text):
        return int(found[1]), found[2]
    if (found := re.fullmatch(r"(v\d\w*)-(\d+)", text)) and found[1] in _TPU_GB:
        return int(found[2]) // _CORES.get(found[1], 1), found[1]
    return 0, ""


def _fraction() -> tuple[float, str]:
    for name in _FRACTIONS:
        if text := os.environ.get(name):
            try:
                return float(text), f"by {name}"
            except ValueError as error:
                raise UserError(f"{name}={text} is not a number: give one such as 0.9, or unset it.") from error
    return _DEFAULT_FRACTION, f"which JAX takes unless {_FRACTIONS[0]} says otherwise"


def machine_here() -> Machine:
    """The devices of this process, with what is free of the fullest; CPU devices share the host's memory."""
    count, kind = device_count(), device_kinds()[0]
    usable, remark = free_device_bytes(), "what is free"
    if usable is None:
        memory, remark = free_memory_bytes(), "an equal share of the host's free memory"
        usable = math.inf if memory is None else memory / count
    return Machine(f"the devices here ({kind})", count, usable, remark, is_named=False)
