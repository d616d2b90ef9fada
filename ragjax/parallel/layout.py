"""How the questions of a step are shared out over groups and micro-batches, on the host."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the items of a step are shared out, in their order."""

    groups: int
    micro_batches: int  # of each group
    size: int  # items in a micro-batch, at most
    own: tuple[int, ...] | None = None  # the groups whose batches are made in this process; None: all

    @property
    def parts(self) -> int:
        """Micro-batches of all groups."""
        return self.groups * self.micro_batches

    def cut(self, times: int) -> "Layout":
        """The same groups with `times` as many micro-batches, each smaller by as much."""
        return dataclasses.replace(self, micro_batches=self.micro_batches * times, size=-(-self.size // times))

    def split(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        """Items of each group and micro-batch, groups first; the last ones may have none."""
        return [items[place * self.size : (place + 1) * self.size] for place in range(self.parts)]

    def stack(self, items: Sequence[Any], make: Callable[[Sequence[Any]], Any]) -> Any:
        """`make` for the items of each group and micro-batch, stacked [groups, micro-batches, ...].

        What has no items, or is made elsewhere, gets the zeros of a made batch: its masks are then empty.
        """
        parts = self.split(items)
        filled = [place for place, part in enumerate(parts) if part]
        own = [place for place in filled if self.own is None or place // self.micro_batches in self.own]
        # The first is made where none is, for its shape.
        stacked = stack_groups({place: make(parts[place]) for place in own or filled[:1]}, self.parts)
        return jax.tree.map(lambda leaf: leaf.reshape(self.groups, self.micro_batches, *leaf.shape[1:]), stacked)


def layout_of(batch_size: int, micro_batches: int, groups: int, own: tuple[int, ...] | None = None) -> Layout:
    """The layout of at most `batch_size` items over all groups. own: see `Layout`."""
    return Layout(groups, micro_batches, -(-batch_size // (groups * micro_batches)), own)


def idle_groups(batch_size: int, micro_batches: int, groups: int) -> int:
    """Groups that get no item of a full step."""
    layout = layout_of(batch_size, micro_batches, groups)
    filled = -(-batch_size // layout.size)  # micro-batches with items
    return layout.groups - -(-filled // layout.micro_batches)


def stack_groups(made: Mapping[int, Any], count: int) -> Any:
    """[count, ...] from at least one tree of host arrays, each at its place; zeros stand for those missing."""
    empty = jax.tree.map(np.zeros_like, next(iter(made.values())))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(made.get(place, empty) for place in range(count)))


def stack_copies(batches: Sequence[Any]) -> Any:
    """[groups, copies, micro-batches, ...] from each copy's batch [groups, micro-batches, ...]."""
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *batches)


def join_copies(values: np.ndarray) -> np.ndarray:
    """[copies, n] from values [groups, copies, micro-batches, questions]: each copy's, in the order of the items."""
    return np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
