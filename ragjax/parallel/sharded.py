"""Devices on a mesh: weights are shared out by a table of rules, and `jax.jit` finds the collectives.

    data     groups with different questions and the same weights
    fsdp     groups with different questions that keep a part of the weights each, and fetch a layer when it is used
    tensor   devices of one group: each multiplies by its part of the weights

Notable choices
- The objective of one group runs under `jax.vmap`, and the gradient is taken outside of that: so a weight's gradient is
  summed over the groups where it arises. The sums are float32 (`ragjax.models.products.weight_product`), so that the
  order of the devices does not decide the sign of a small one.
- What fsdp has shared out is fetched where it is used, and its gradient is shared out again at once. This is said, not
  left to the compiler, which would rather move the states of all groups than a weight. The layers of a stack fetch
  theirs one after another (`layer_fetcher`), all else is fetched when the objective begins.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ragjax.errors import UserError
from ragjax.meshes import AXES, DATA, FSDP, TENSOR, mesh_text
from ragjax.parallel.arrangement import Index, MakeStep, Reducer, copied
from ragjax.parallel.layout import Layout, layout_of
from ragjax.parallel.processes import lies_here

# The path of a leaf -> the axis of the mesh that shares out each of its last dimensions, or None.
Rules = Callable[[str], Sequence[str | None]]

# What fetched weights are called for rematerialisation.
FETCHED = "fetched"

_GROUPS = (DATA, FSDP)
_fetcher: contextvars.ContextVar[Callable[[Any], Any] | None] = contextvars.ContextVar("fetcher", default=None)


def layer_fetcher() -> Callable[[Any], Any] | None:
    """What a layer's weights, {path: leaf} nested in any way, have to go through where a layer begins to use them.

    None outside of a step over a mesh.
    """
    return _fetcher.get()


@contextlib.contextmanager
def _layers_fetch(fetch: Callable[[Any], Any]) -> Generator[None]:
    token = _fetcher.set(fetch)
    try:
        yield
    finally:
        _fetcher.reset(token)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the devices (those of all processes by default) with these sizes of its axes, 1 where one is left out.

    Raises:
      UserError: the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes.get(name, 1) for name in AXES]
    if (product := int(np.prod(shape))) != len(devices):
        raise UserError(
            f"--mesh={mesh_text(sizes)} is a mesh of {product} devices, and there are {len(devices)} here: choose axes "
            f"whose product is {len(devices)}, such as fsdp:{len(devices)}."
        )
    # Auto, because Linen's layers do not say how their results lie, which `make_mesh` would ask of them by default.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


@dataclasses.dataclass(frozen=True)
class Sharded:
    """Devices on a mesh."""

    mesh: Mesh
    rules: Rules

    @property
    def groups(self) -> int:
        return self.mesh.shape[DATA] * self.mesh.shape[FSDP]

    @property
    def copies(self) -> int:
        return 1

    def layout(self, batch_size: int, micro_batches: int) -> Layout:
        return layout_of(batch_size, micro_batches, self.groups, self._own_groups)

    @functools.cached_property
    def _own_groups(self) -> tuple[int, ...] | None:
        """Those with a device of this process; None: all."""
        mine = jax.process_index()
        has_mine = [any(d.process_index == mine for d in those) for those in self.mesh.devices.reshape(self.groups, -1)]
        return None if all(has_mine) else tuple(np.flatnonzero(has_mine).tolist())

    # --- placing

    def check(self, shapes: Any, model: str) -> None:
        """Raises UserError where the tensor axis does not divide a width that it shares out.

        shapes: the model's parameters or their shapes, before any of them is quantised. model: its name.
        """
        size = self.mesh.shape[TENSOR]
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
            name = _path(path)
            axes = self.rules(name)
            for width, axis in zip(leaf.shape[len(leaf.shape) - len(axes) :], axes, strict=True):
                if axis == TENSOR and width % size:
                    raise UserError(
                        f"--mesh has tensor:{size}, which does not divide {width:,}, a width of {model}'s {name}: "
                        "choose a divisor of it, or share the weights out over fsdp alone."
                    )

    def sharding(self, path: str, shape: Sequence[int], fetched: bool = False) -> NamedSharding:
        """How a leaf lies, or how it is used (`fetched`). A dimension that its axis does not divide stays whole."""
        axes = self.rules(path)
        first = len(shape) - len(axes)  # of layers, and of copies
        fitting = [
            axis if axis and width % self.mesh.shape[axis] == 0 and not (fetched and axis == FSDP) else None
            for width, axis in zip(shape[first:], axes, strict=True)
        ]
        return NamedSharding(self.mesh, PartitionSpec(*[None] * first, *fitting))

    def keep(self, tree: Any) -> Any:
        return self.place(tree)

    def load(self, path: str, shape: Sequence[int], read: Callable[[Index], np.ndarray]) -> jax.Array:
        # Devices that differ in `data` hold the same parts, and ask for them one after the other.
        known: dict[str, np.ndarray] = {}

        def part(index: Index | None) -> np.ndarray:
            assert index is not None  # which jax's own type allows for, and jax does not give
            if (key := str(index)) not in known:
                known[key] = read(index)
            return known[key]

        return jax.make_array_from_callback(tuple(shape), self.sharding(path, shape), part)

    def place(self, tree: Any, *, donated: bool = False) -> Any:
        placed = _put(tree, self._shardings(tree))
        return copied(placed) if donated else placed

    def _shardings(self, tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: self.sharding(_path(path), leaf.shape), tree)

    def bytes_of(self, tree: Any) -> int:
        shares = zip(jax.tree.leaves(tree), jax.tree.leaves(self._shardings(tree)), strict=True)
        return sum(math.prod(lying.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, lying in shares)

    # --- compiling

    @property
    def reducer(self) -> Reducer:
        """What a step is written against here."""
        # It sees all groups, so that nothing is left to be added up.
        return Reducer(each=lambda objective: self._over_groups(objective, (None, None, 0, None), weights=2))

    def _over_groups(self, function: Callable, in_axes: tuple[int | None, ...], weights: int) -> Callable:
        """The function of one group for all of them.

        Its first arguments, so many, are weights; the others are the group's own (axis 0) or shared by all (None).
        """
        mapped = jax.vmap(function, in_axes=in_axes, spmd_axis_name=_GROUPS)

        def over_groups(*arguments: Any) -> Any:
            fetched = map(self._fetch, arguments[:weights])
            with _layers_fetch(self._fetch):
                return mapped(*fetched, *arguments[weights:])

        return over_groups

    def _fetch(self, tree: Any) -> Any:
        """The weights as they are used, but for those that are still stacked."""

        def fetch(path: Any, leaf: Any) -> Any:
            name = _path(path)
            if leaf.ndim > len(self.rules(name)):
                return leaf
            lying, used = (self.sharding(name, leaf.shape, fetched) for fetched in (False, True))
            if lying == used:
                return leaf
            # Both are said, so that backwards the gradient is added up as it is used, and then lies as the weight does.
            leaf = jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(leaf, lying), used)
            return checkpoint_name(leaf, FETCHED)

        return jax.tree_util.tree_map_with_path(fetch, tree)

    def compile_step(self, make_step: MakeStep) -> Callable:
        compiled = self.jit_step(make_step(self.reducer))
        return lambda state, frozen, batch: compiled(state, frozen, self.place_batch(batch, 1))

    def lower_step(self, make_step: MakeStep, state: Any, frozen: Any, batch: Any) -> jax.stages.Lowered:
        return self.jit_step(make_step(self.reducer)).lower(
            self._lying(state), self._lying(frozen), self._lying_batch(batch, 1)
        )

    def compile_copies(self, make_step: MakeStep) -> Callable:
        compiled = self.jit_step(jax.vmap(make_step(self.reducer), in_axes=(0, None, 0)))
        return lambda state, frozen, batch: compiled(state, frozen, self.place_batch(batch, 2))

    def jit_step(self, step: Callable) -> Any:
        """A step of placed arguments under jit: its new state lies as the old one does, whose memory it takes over."""

        @functools.partial(jax.jit, donate_argnums=0)
        def compiled(state: Any, frozen: Any, batch: Any) -> Any:
            state, metrics = step(state, frozen, batch)
            return jax.lax.with_sharding_constraint(state, self._shardings(state)), metrics

        return compiled

    def compile_sums(self, make_step: MakeStep) -> Callable:
        compiled = jax.jit(make_step(self.reducer))
        return lambda trainable, frozen, batch: compiled(trainable, frozen, self.place_batch(batch, 1))

    def compile_map(self, function: Callable) -> Callable:
        compiled = self._map(function)
        return lambda placed, x: compiled(placed, self.place_batch(x, 0))

    def lower_map(self, function: Callable, placed: Any, x: Any) -> jax.stages.Lowered:
        return self._map(function).lower(self._lying(placed), self._lying_batch(x, 0))

    def _map(self, function: Callable) -> Any:
        return jax.jit(self._over_groups(function, (None, 0), weights=1))

    def place_batch(self, batch: Any, behind: int) -> Any:
        """Each group's part of a host's batch [groups, ...] on its devices, the axis of groups behind `behind` more."""
        moved = jax.tree.map(lambda leaf: np.moveaxis(leaf, 0, behind), batch)
        sharding = self._batch_sharding(behind)
        return _put(moved, jax.tree.map(lambda _: sharding, moved))

    def _lying(self, tree: Any) -> Any:
        """Shapes of a tree's leaves, with how `place` would put them."""
        return jax.tree.map(_shaped, tree, self._shardings(tree))

    def _lying_batch(self, batch: Any, behind: int) -> Any:
        """The same for `place_batch`."""

        def moved(leaf: Any) -> jax.ShapeDtypeStruct:
            groups, *rest = leaf.shape
            shape = jax.ShapeDtypeStruct((*rest[:behind], groups, *rest[behind:]), leaf.dtype)
            return _shaped(shape, self._batch_sharding(behind))

        return jax.tree.map(moved, batch)

    def _batch_sharding(self, behind: int) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*[None] * behind, _GROUPS))


def _put(tree: Any, shardings: Any) -> Any:
    """`jax.device_put`; where devices of other processes take part, each gives its own what it has of a leaf."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if not lies_here(leaf):
            return jax.device_put(leaf, sharding)
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    # jax.device_put would send every leaf to all processes, to see that they have the same.
    return jax.device_put(tree, shardings) if jax.process_count() == 1 else jax.tree.map(put, tree, shardings)


def _shaped(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
