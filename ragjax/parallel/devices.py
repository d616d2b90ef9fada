"""The devices of this process: how many there are, what they are, and arrays with a share on each."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ragjax.errors import UserError, reason

_AXIS = "devices"


def device_count() -> int:
    """Of this process."""
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


def pretend_devices(count: int) -> None:
    """Lets JAX see so many CPU devices and no other: programs for a machine of that many can be compiled for them.

    Raises:
      UserError: this process has used devices already, other than these.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)  # which is what raises
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError as error:
        if jax.default_backend() != "cpu" or jax.local_device_count() != count:
            raise UserError(
                f"a machine of {count} devices can be tried out only before JAX has used those that are here: start a "
                "process of its own."
            ) from error


def device_kinds() -> list[str]:
    """What the devices are, of all processes."""
    return [str(device.device_kind) for device in jax.devices()]


# ---- shares ------------------------------------------------------------------------------------------------


def place_shares(shape: Sequence[int], axis: int, make: Callable[[int], np.ndarray]) -> jax.Array:
    """An array whose `axis` has an entry for each device, which lies there and nowhere else.

    make: device's number -> its entry, of this shape with length 1 on `axis`; called for one after another.
    """
    sharding = NamedSharding(_all_in_a_row(), PartitionSpec(*[None] * axis, _AXIS))

    def entry(index: Any) -> np.ndarray:
        return make(index[axis].start or 0)

    return jax.make_array_from_callback(tuple(shape), sharding, entry)


def map_shares(function: Callable, whole: Any, shares: Any, axis: int) -> Any:
    """`function(whole, share)` of each device, computed where its share lies; leaves of the result are [devices, ...].

    shares: arrays from `place_shares` and others with an entry for each device on `axis`, which has length 1 in what
    the function gets. Its own result has the length 1 on axis 0. For use inside a compiled function.
    """
    spec = PartitionSpec(*[None] * axis, _AXIS)
    mapped = jax.shard_map(
        function,
        mesh=_all_in_a_row(),
        in_specs=(PartitionSpec(), spec),
        out_specs=PartitionSpec(_AXIS),
        check_vma=False,  # what a function makes itself, such as the start of a loop, is a share, too
    )
    return mapped(whole, shares)


def _all_in_a_row() -> Mesh:
    return Mesh(np.asarray(jax.local_devices()), (_AXIS,))
