"""The layout of devices: how a step's questions are shared out, where its arrays lie, how it is compiled.

Every batch has the leading axes [groups, micro-batches, ...]: groups compute side by side, one on each of the process's
devices, and each takes its micro-batches one after another. No other module counts devices or names an axis. The
training step is one pure function written against a `Reducer`: under `jax.pmap` its `sum` crosses the groups, on one
device it is the identity.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ragjax.errors import UserError, reason

_AXIS = "groups"


def refuse_several_processes() -> None:
    """Raises UserError where this process is one of several that JAX has joined."""
    if (count := jax.process_count()) > 1:
        raise UserError(
            f"ragjax runs in one process, and this is one of {count}: start it once, on one host; it uses all devices "
            "there."
        )


# ---- sharing out -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the items of a step are shared out, in their order."""

    groups: int
    micro_batches: int  # of each group
    size: int  # items in a micro-batch, at most

    @property
    def parts(self) -> int:
        """Micro-batches of all groups."""
        return self.groups * self.micro_batches

    def cut(self, times: int) -> "Layout":
        """The same groups with `times` as many micro-batches, each smaller by as much."""
        return Layout(self.groups, self.micro_batches * times, -(-self.size // times))

    def split(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        """Items of each group and micro-batch, groups first; the last ones may have none."""
        return [items[place * self.size : (place + 1) * self.size] for place in range(self.parts)]

    def stack(self, items: Sequence[Any], make: Callable[[Sequence[Any]], Any]) -> Any:
        """`make` for the items of each group and micro-batch, stacked [groups, micro-batches, ...].

        What has no items gets the zeros of a made batch: its masks are then empty.
        """
        made = [make(part) for part in self.split(items) if part]
        stacked = stack_groups(made, self.parts)
        return jax.tree.map(lambda leaf: leaf.reshape(self.groups, self.micro_batches, *leaf.shape[1:]), stacked)


def layout_of(batch_size: int, micro_batches: int) -> Layout:
    """The layout of at most `batch_size` items over all groups."""
    groups = group_count()
    return Layout(groups, micro_batches, -(-batch_size // (groups * micro_batches)))


def idle_groups(batch_size: int, micro_batches: int) -> int:
    """Groups that get no item of a full step."""
    layout = layout_of(batch_size, micro_batches)
    filled = -(-batch_size // layout.size)  # micro-batches with items
    return layout.groups - -(-filled // layout.micro_batches)


def group_count() -> int:
    return jax.local_device_count()


def free_device_bytes() -> int | None:
    """Free memory of the fullest device; None where devices do not tell, as a CPU."""
    told = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    return min((stats["bytes_limit"] - stats["bytes_in_use"] for stats in told), default=None)


def check_platform() -> None:
    """Raises UserError where JAX cannot start, for one because JAX_PLATFORMS names what is not there."""
    try:
        jax.local_devices()
    except Exception as error:  # a bare AssertionError among them
        why = f" ({reason(error)})" if str(error) else ""
        # jax gives its configuration the options while it is imported, which a checker does not see.
        platforms = jax.config.jax_platforms  # ty: ignore[missing-attribute]
        if not platforms:
            raise UserError(f"JAX finds no device that it can use{why}: set JAX_PLATFORMS=cpu.") from error
        raise UserError(
            f"JAX_PLATFORMS={platforms} asks for a platform that JAX cannot use here{why}: unset it, "
            "write cpu, cuda or tpu in small letters, or install JAX for it (ragjax[cuda12], [cuda13] or [tpu])."
        ) from error


def device_kinds() -> list[str]:
    """What the groups' devices are."""
    return [str(device.device_kind) for device in jax.local_devices()]


def stack_groups(made: Sequence[Any], count: int) -> Any:
    """[count, ...] from at least one tree of host arrays and at most `count` of them; zeros stand for those missing."""
    empty = [jax.tree.map(np.zeros_like, made[0])] * (count - len(made))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *made, *empty)


def stack_copies(batches: Sequence[Any]) -> Any:
    """[groups, copies, micro-batches, ...] from each copy's batch [groups, micro-batches, ...]."""
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *batches)


def join_copies(values: np.ndarray) -> np.ndarray:
    """[copies, n] from values [groups, copies, micro-batches, questions]: each copy's, in the order of the items."""
    return np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)


# ---- placing -----------------------------------------------------------------------------------------------


def place(tree: Any, devices: Sequence[jax.Device] | None = None, *, donated: bool = False) -> Any:
    """Puts every leaf where all groups have it, once, so that a call of a compiled step copies nothing.

    donated: in memory of its own, for a step that reuses it; the given arrays stay usable.
    """
    mesh = Mesh(np.asarray(devices or jax.local_devices()), (_AXIS,))
    placed = jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
    return jax.tree.map(jax.numpy.copy, placed) if donated else placed


def place_shares(shape: Sequence[int], axis: int, make: Callable[[int], np.ndarray]) -> jax.Array:
    """An array whose `axis` has an entry for each group, which lies on the group's device and nowhere else.

    make: group -> its entry, of this shape with length 1 on `axis`; called for one group after another.
    """
    sharding = NamedSharding(_local_mesh(), PartitionSpec(*[None] * axis, _AXIS))

    def entry(index: Any) -> np.ndarray:
        return make(index[axis].start or 0)

    return jax.make_array_from_callback(tuple(shape), sharding, entry)


def map_shares(function: Callable, whole: Any, shares: Any, axis: int) -> Any:
    """`function(whole, share)` of each group, computed where its share lies; leaves of the result are [groups, ...].

    shares: arrays from `place_shares` and others with an entry for each group on `axis`, which has length 1 in what the
    function gets. Its own result has the length 1 on axis 0. For use inside a compiled function.
    """
    spec = PartitionSpec(*[None] * axis, _AXIS)
    mapped = jax.shard_map(
        function,
        mesh=_local_mesh(),
        in_specs=(PartitionSpec(), spec),
        out_specs=PartitionSpec(_AXIS),
        check_vma=False,  # what a function makes itself, such as the start of a loop, is a share, too
    )
    return mapped(whole, shares)


def _local_mesh() -> Mesh:
    return Mesh(np.asarray(jax.local_devices()), (_AXIS,))


# ---- compiling ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reducer:
    """How a step's values of each group meet: `sum` adds pytrees over the groups."""

    sum: Callable[[Any], Any]


ONE_DEVICE = Reducer(sum=lambda tree: tree)
_GROUPS = Reducer(sum=lambda tree: jax.lax.psum(tree, _AXIS))


def compile_step(make_step: Callable[[Reducer], Callable], devices: Sequence[jax.Device] | None = None) -> Callable:
    """Compiles a step for all groups.

    Args:
      make_step: builds `step(state, frozen, batch) -> (state, metrics)` for a reducer.
      devices: one for each group; the local ones by default.

    Returns:
      The step. State and frozen parameters come from `place`, without an axis of groups (`in_axes=None`); every leaf
      of the batch has that axis first, and the given function sees its group's part without it. The state is donated.
    """
    return jax.pmap(
        make_step(_GROUPS),
        axis_name=_AXIS,
        in_axes=(None, None, 0),
        out_axes=(None, None),
        donate_argnums=(0,),
        devices=devices,
    )


def compile_sums(make_step: Callable[[Reducer], Callable], devices: Sequence[jax.Device] | None = None) -> Callable:
    """`compile_step` for a step that changes nothing: (trainable, frozen, batch) -> sums."""
    return jax.pmap(make_step(_GROUPS), axis_name=_AXIS, in_axes=(None, None, 0), out_axes=None, devices=devices)


def compile_map(function: Callable, devices: Sequence[jax.Device] | None = None) -> Callable:
    """`function(placed, x)` for every group's own x: leaves of x and of the result have the axis of groups first."""
    return jax.pmap(function, axis_name=_AXIS, in_axes=(None, 0), devices=devices)
