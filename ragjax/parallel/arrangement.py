"""What the two ways in which devices work together promise to training: `Replicated` and `Sharded`.

The training step is one pure function of one group's batch, written against a `Reducer`, which names no axis. Every
batch has the leading axes [groups, micro-batches, ...]: groups compute side by side, and each takes its micro-batches
one after another. All rows of a question lie in one group.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from ragjax.parallel.layout import Layout


def _same(value: Any) -> Any:
    return value


@dataclasses.dataclass(frozen=True)
class Reducer:
    """How a step's values of each group meet.

    each: an objective of one group's micro-batch, (trainable, frozen, micro-batch, key) -> values a question, becomes
      that of all groups whose micro-batches the step sees at once.
    sum: adds pytrees over the groups that it does not see.
    """

    each: Callable[[Callable], Callable] = _same
    sum: Callable[[Any], Any] = _same


ONE_DEVICE = Reducer()


@jax.jit
def copied(tree: Any) -> Any:
    """The tree in memory of its own, lying as it lay."""
    return jax.tree.map(jnp.copy, tree)


# What a part of an array is: a slice for each dimension.
Index = tuple[slice, ...]
MakeStep = Callable[[Reducer], Callable]


@runtime_checkable
class Arrangement(Protocol):
    """How the process's devices work together."""

    @property
    def groups(self) -> int: ...

    @property
    def copies(self) -> int:
        """Devices with all weights each, to which work can be given that is done apart: 1 on a mesh."""

    def layout(self, batch_size: int, micro_batches: int) -> Layout:
        """The layout of at most `batch_size` items over all groups."""

    def keep(self, tree: Any) -> Any:
        """Puts a model's weights where they lie while nothing is trained."""

    def check(self, shapes: Any, model: str) -> None:
        """Raises UserError where a model with parameters of these shapes (whole ones, not quantised) has no place."""

    def load(self, path: str, shape: Sequence[int], read: Callable[[Index], np.ndarray]) -> jax.Array:
        """One leaf of a model's weights, where `keep` would put it.

        read: gives a part of the leaf; called for the parts that the devices here hold.
        """

    def place(self, tree: Any, *, donated: bool = False) -> Any:
        """Puts every leaf where a step wants it, once, so that a call of a compiled step copies nothing.

        donated: in memory of its own, for a step that reuses it; the given arrays stay usable.
        """

    def bytes_of(self, tree: Any) -> int:
        """What a tree takes of each device where `place` puts it; its leaves may be shapes."""

    def compile_step(self, make_step: MakeStep) -> Callable:
        """Compiles a step for all groups.

        make_step: builds `step(state, frozen, batch) -> (state, metrics)` for a reducer.

        Returns the step. State and frozen parameters come from `place`, without an axis of groups; every leaf of the
        batch has that axis first, and the given function sees its micro-batches first. The state is donated.
        """

    def lower_step(self, make_step: MakeStep, state: Any, frozen: Any, batch: Any) -> jax.stages.Lowered:
        """The program of `compile_step` for arguments of these shapes, lying as they would: none is there."""

    def compile_copies(self, make_step: MakeStep) -> Callable:
        """The same for stacked copies of the state, [copies, ...], and batches [groups, copies, micro-batches, ...]."""

    def compile_sums(self, make_step: MakeStep) -> Callable:
        """`compile_step` for a step that changes nothing: (trainable, frozen, batch) -> sums."""

    def compile_map(self, function: Callable) -> Callable:
        """`function(placed, x)` of every group's x; leaves of x and of the result have the axis of groups first."""

    def lower_map(self, function: Callable, placed: Any, x: Any) -> jax.stages.Lowered:
        """The program of `compile_map` for arguments of these shapes, as `lower_step`."""
