"""Several processes that JAX has joined, one or more on each host, which work on one run.

All of them go through the same steps: they read the same questions, in the same order, and take every decision from
numbers that all of them have. So a compiled program that spans their devices is called by all of them at once, and
what is shared out beside it (searching) is exchanged before anybody goes on. In one process every function here gives
back what it was given.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ragjax.errors import UserError

_AT_ONCE = 1 << 28  # bytes


def refuse_several_processes() -> None:
    """Raises UserError where this process is one of several that JAX has joined."""
    if (count := jax.process_count()) > 1:
        raise UserError(
            f"only ragjax.train runs in several processes, and this is one of {count}: start it once, on one host; it "
            "uses all devices there."
        )


def process_count() -> int:
    """Processes that JAX has joined."""
    return jax.process_count()


def all_device_count() -> int:
    """Of all processes."""
    return jax.device_count()


def wait_for_all(where: str) -> None:
    """Returns when all processes have come here. where: names the place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def largest_of_all(value: int) -> int:
    """The largest of the processes' values."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def same_for_all(text: str) -> bool:
    """Whether all processes have the same text."""
    if jax.process_count() == 1:
        return True
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") >> 1
    return not largest_of_all(largest_of_all(number) != number)


def check_same(what: str, value: Any) -> None:
    """Raises UserError, in all processes, where they do not have the same. what: names it. value: whose text is it."""
    if not same_for_all(repr(value)):
        raise UserError(f"the processes do not have, or do not see, the same {what}: give all of them the same.")


def to_host(tree: Any) -> Any:
    """The tree's arrays on this host, whole, also those of which other processes hold parts; leaf after leaf.

    All processes have to call it.
    """
    return jax.tree.map(_leaf_to_host, tree)


def _leaf_to_host(leaf: Any) -> Any:
    if lies_here(leaf) or leaf.is_fully_replicated:
        return jax.device_get(leaf)
    if leaf.nbytes <= _AT_ONCE or not leaf.ndim:
        return multihost_utils.process_allgather(leaf, tiled=True)
    # Every device gets what is gathered at once, so a large leaf comes piece by piece.
    size = max(_AT_ONCE * len(leaf) // leaf.nbytes, 1)
    whole = np.empty(leaf.shape, leaf.dtype)
    for start in range(0, len(leaf), size):
        start = min(start, len(leaf) - size)  # the last one overlaps, so that all have one shape
        whole[start : start + size] = multihost_utils.process_allgather(_piece(leaf, start, size), tiled=True)
    return whole


@functools.partial(jax.jit, static_argnames="size")
def _piece(leaf: Any, start: int, size: int) -> Any:
    return jax.lax.dynamic_slice_in_dim(leaf, start, size)


def lies_here(leaf: Any) -> bool:
    """Whether this process has all of an array."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def share_out(function: Callable[[slice], Sequence[np.ndarray]], count: int) -> list[np.ndarray]:
    """The function's arrays for `count` items, of which each process computes a part and gets all.

    function: a range of the items, which may be empty -> arrays [items of the range, ...].
    """
    many = jax.process_count()
    if many == 1:
        return list(function(slice(0, count)))
    size = -(-count // many)
    start = min(jax.process_index() * size, count)
    return [_gathered(each, size)[:count] for each in function(slice(start, min(start + size, count)))]


def _gathered(own: np.ndarray, size: int) -> np.ndarray:
    """All processes' parts in their order, `size` items each; as bytes, because JAX has no numbers of 64 bits."""
    item = own.shape[1:]
    raw = np.ascontiguousarray(own).reshape(len(own), int(np.prod(item))).view(np.uint8)
    found = multihost_utils.process_allgather(np.pad(raw, [(0, size - len(raw)), (0, 0)]), tiled=True)
    return np.ascontiguousarray(found).view(own.dtype).reshape(-1, *item)
