"""Every device has all weights and is a group of its own: `jax.pmap`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ragjax.parallel.arrangement import Index, MakeStep, Reducer, copied
from ragjax.parallel.layout import Layout, layout_of

_AXIS = "groups"
_SUMMED = Reducer(sum=lambda tree: jax.lax.psum(tree, _AXIS))


@dataclasses.dataclass(frozen=True)
class Replicated:
    """State and frozen weights are replicated arrays that are passed with `in_axes=None`: no copy a call, and no axis
    of groups in the state.
    """

    devices: Sequence[jax.Device] | None = None  # the local ones

    @property
    def groups(self) -> int:
        return len(self._mapped)

    @property
    def _mapped(self) -> Sequence[jax.Device]:
        """Said to pmap, which would else take the devices of all processes."""
        return self.devices or jax.local_devices()

    @property
    def copies(self) -> int:
        return self.groups

    def layout(self, batch_size: int, micro_batches: int) -> Layout:
        return layout_of(batch_size, micro_batches, self.groups)

    def keep(self, tree: Any) -> Any:
        """On the first device: what trains or encodes places copies on the others."""
        return jax.tree.map(jnp.asarray, tree)

    def check(self, shapes: Any, model: str) -> None:
        """Every model has a place."""

    def load(self, path: str, shape: Sequence[int], read: Callable[[Index], np.ndarray]) -> jax.Array:
        return jax.device_put(read((slice(None),) * len(shape)))

    def place(self, tree: Any, *, donated: bool = False) -> Any:
        mesh = Mesh(np.asarray(self._mapped), (_AXIS,))
        placed = jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
        return copied(placed) if donated else placed

    def bytes_of(self, tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    def compile_step(self, make_step: MakeStep) -> Callable:
        return self._compile_step(make_step(_SUMMED))

    def lower_step(self, make_step: MakeStep, state: Any, frozen: Any, batch: Any) -> jax.stages.Lowered:
        return self._compile_step(make_step(_SUMMED)).lower(state, frozen, batch)

    def compile_copies(self, make_step: MakeStep) -> Callable:
        return self._compile_step(jax.vmap(make_step(_SUMMED), in_axes=(0, None, 0)))

    def _compile_step(self, step: Callable) -> Any:
        return jax.pmap(
            step,
            axis_name=_AXIS,
            in_axes=(None, None, 0),
            out_axes=(None, None),
            donate_argnums=(0,),
            devices=self._mapped,
        )

    def compile_sums(self, make_step: MakeStep) -> Callable:
        step = make_step(_SUMMED)
        return jax.pmap(step, axis_name=_AXIS, in_axes=(None, None, 0), out_axes=None, devices=self._mapped)

    def compile_map(self, function: Callable) -> Callable:
        return self._map(function)

    def lower_map(self, function: Callable, placed: Any, x: Any) -> jax.stages.Lowered:
        return self._map(function).lower(placed, x)

    def _map(self, function: Callable) -> Any:
        return jax.pmap(function, axis_name=_AXIS, in_axes=(None, 0), devices=self._mapped)


# On all devices here.
REPLICATED = Replicated()
