"""The layout of devices: how a step's questions are shared out, where its arrays lie, how it is compiled.

No other room counts devices or names an axis.

arrange                   --parallelism and --mesh -> the arrangement of this process's devices
Arrangement, Reducer      what it promises; what a step is written against          arrangement.py
Replicated, REPLICATED    all weights on each device: jax.pmap; on all of them      replicated.py
Sharded, make_mesh        weights shared out over a mesh: jax.jit                   sharded.py
Layout, stack_...         questions -> groups and micro-batches, on the host        layout.py
device_count, ...         this process's devices, and arrays with a share on each   devices.py
"""

from collections.abc import Mapping

from ragjax.parallel.arrangement import ONE_DEVICE, Arrangement, Reducer
from ragjax.parallel.devices import (
    check_platform,
    device_count,
    device_kinds,
    free_device_bytes,
    map_shares,
    place_shares,
    pretend_devices,
    refuse_several_processes,
)
from ragjax.parallel.layout import Layout, idle_groups, join_copies, layout_of, stack_copies, stack_groups
from ragjax.parallel.replicated import REPLICATED, Replicated
from ragjax.parallel.sharded import FETCHED, Rules, Sharded, layer_fetcher, make_mesh

__all__ = [
    "FETCHED",
    "ONE_DEVICE",
    "REPLICATED",
    "Arrangement",
    "Layout",
    "Reducer",
    "Replicated",
    "Sharded",
    "arrange",
    "check_platform",
    "device_count",
    "device_kinds",
    "free_device_bytes",
    "idle_groups",
    "join_copies",
    "layer_fetcher",
    "layout_of",
    "make_mesh",
    "map_shares",
    "place_shares",
    "pretend_devices",
    "refuse_several_processes",
    "stack_copies",
    "stack_groups",
]


def arrange(parallelism: str, sizes: Mapping[str, int], rules: Rules) -> Arrangement:
    """The arrangement of this process's devices.

    Args:
      parallelism: "pmap" or "mesh".
      sizes: of the mesh's axes; none: fsdp over all devices.
      rules: how weights are shared out on a mesh.

    Raises:
      UserError: the mesh is of another number of devices.
    """
    if parallelism == "pmap":
        return REPLICATED
    return Sharded(make_mesh(sizes or {"fsdp": device_count()}), rules)
