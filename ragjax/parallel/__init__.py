"""The layout of devices: how a step's questions are shared out, where its arrays lie, how it is compiled.

No other room counts devices or names an axis.

arrange                   --parallelism and --mesh -> the arrangement of the devices
Arrangement, Reducer      what it promises; what a step is written against          arrangement.py
Replicated, REPLICATED    all weights on each device: jax.pmap; on all of them      replicated.py
Sharded, make_mesh        weights shared out over a mesh: jax.jit                   sharded.py
Layout, stack_...         questions -> groups and micro-batches, on the host        layout.py
device_count, ...         this process's devices, and arrays with a share on each   devices.py
share_out, to_host, ...   what several processes do together                        processes.py
join_processes, ...       joining them, and hearing of it when one is lost          joining.py
"""

from collections.abc import Mapping

import jax

from ragjax.errors import UserError
from ragjax.parallel.arrangement import ONE_DEVICE, Arrangement, Reducer
from ragjax.parallel.devices import (
    check_platform,
    device_count,
    device_kinds,
    free_device_bytes,
    map_shares,
    place_shares,
    pretend_devices,
)
from ragjax.parallel.joining import agree_to_end, end_watch, join_processes, wait_for_word
from ragjax.parallel.layout import Layout, idle_groups, join_copies, layout_of, stack_copies, stack_groups
from ragjax.parallel.processes import (
    all_device_count,
    check_same,
    largest_of_all,
    lies_here,
    process_count,
    refuse_several_processes,
    same_for_all,
    share_out,
    to_host,
    wait_for_all,
)
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
    "agree_to_end",
    "all_device_count",
    "arrange",
    "check_platform",
    "check_same",
    "device_count",
    "device_kinds",
    "end_watch",
    "free_device_bytes",
    "idle_groups",
    "join_copies",
    "join_processes",
    "largest_of_all",
    "layer_fetcher",
    "layout_of",
    "lies_here",
    "make_mesh",
    "map_shares",
    "place_shares",
    "pretend_devices",
    "process_count",
    "refuse_several_processes",
    "same_for_all",
    "share_out",
    "stack_copies",
    "stack_groups",
    "to_host",
    "wait_for_all",
    "wait_for_word",
]


def arrange(parallelism: str, sizes: Mapping[str, int], rules: Rules) -> Arrangement:
    """The arrangement of the devices, of all processes where there are several.

    Args:
      parallelism: "pmap" or "mesh".
      sizes: of the mesh's axes; none: fsdp over all devices.
      rules: how weights are shared out on a mesh.

    Raises:
      UserError: the mesh is of another number of devices, or several processes have none.
    """
    if parallelism == "mesh":
        return Sharded(make_mesh(sizes or {"fsdp": all_device_count()}), rules)
    if jax.process_count() > 1:
        raise UserError(
            f"--parallelism={parallelism} is for the devices of one process: give --parallelism=mesh, and "
            f"--mesh=data:{all_device_count()} where the weights fit on each device."
        )
    return REPLICATED
