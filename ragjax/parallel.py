"""Data parallelism over the local devices.

The training step is one pure function written against a `Reducer`; under `jax.pmap` its `sum` and `gather` cross
the devices, on one device they are the identity, so the step itself names no axis.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class Reducer:
    """How a step's per-device values meet: `sum` adds pytrees over devices, `gather` joins leading axes."""

    sum: Callable[[Any], Any]
    gather: Callable[[Any], Any]


ONE_DEVICE = Reducer(sum=lambda tree: tree, gather=lambda tree: tree)
_PMAP = Reducer(
    sum=lambda tree: jax.lax.psum(tree, _AXIS),
    gather=lambda tree: jax.lax.all_gather(tree, _AXIS, tiled=True),
)


def replicate(tree: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """Puts every leaf on all devices once, so that a pmapped call copies nothing."""
    mesh = Mesh(np.asarray(devices or jax.local_devices()), (_AXIS,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def pmap_step(make_step: Callable[[Reducer], Callable], devices: Sequence[jax.Device] | None = None) -> Callable:
    """Compiles a step for all devices.

    Args:
      make_step: builds `step(state, frozen, batch) -> (state, metrics)` for a reducer.
      devices: the local devices by default.

    Returns:
      The step. State and frozen parameters are replicated arrays without a device axis (`in_axes=None`); every
      leaf of the batch has a leading device axis; the state is donated.
    """
    return jax.pmap(
        make_step(_PMAP),
        axis_name=_AXIS,
        in_axes=(None, None, 0),
        out_axes=(None, None),
        donate_argnums=(0,),
        devices=devices,
    )


def pmap_sums(make_step: Callable[[Reducer], Callable], devices: Sequence[jax.Device] | None = None) -> Callable:
    """`pmap_step` for a step that changes nothing: (trainable, frozen, batch) -> sums."""
    return jax.pmap(make_step(_PMAP), axis_name=_AXIS, in_axes=(None, None, 0), out_axes=None, devices=devices)


def pmap_map(function: Callable, devices: Sequence[jax.Device] | None = None) -> Callable:
    """`function(replicated, x)` for every device's own x: leaves of x and of the result have a leading device axis."""
    return jax.pmap(function, axis_name=_AXIS, in_axes=(None, 0), devices=devices)
