"""Checkpoints through orbax: the only file that knows it.

A checkpoint holds named trees of host arrays and a JSON object beside them. Saving is atomic (a save that was killed
half-way is never listed) and each tree's own hash is stored and checked, because a flipped bit in a committed file
would otherwise restore silently. Whoever goes on from a checkpoint falls back to an earlier one where the newest is
damaged; whoever uses what was trained does not, since that would be another model.

A checkpoint can be written while its owner goes on: orbax copies what it holds first (on a CPU a step's own memory,
which the next step takes over), and whether it came to be is known when it is waited for, or when anything else is
asked of the folder.
"""

import functools
import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ragjax.errors import UserError, reason
from ragjax.parallel import largest_of_all, lies_here, process_count, to_host
from ragjax.voice import warn


class DamagedCheckpoint(UserError):
    """A checkpoint is not what was saved, or not of this run."""

    def __init__(self, folder: Path, what: str):
        self.fault = f"The checkpoint {folder} {what}"
        super().__init__(
            f"{self.fault}: bring back a copy of that folder, or train again with the same flags in another --run_dir."
        )


class Checkpoints:
    """The checkpoints of one run folder, which the first of them makes."""

    def __init__(self, folder: Path, keep: int = 2):
        self._folder = Path(folder).absolute()
        self._keep = keep
        self._writing: int | None = None  # the step whose checkpoint is on its way

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's, which makes the folder."""
        # Orbax narrates each save, and logs each of its threads' and tasks' failures besides raising one of them:
        # that would bury the one sentence we make of it.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, enable_async_checkpointing=process_count() == 1)
        return ocp.CheckpointManager(self._folder, options=options)

    def steps(self) -> list[int]:
        """Those that have a checkpoint, in order. Waits for one that is being written; raises as `wait`."""
        self.wait()
        return sorted(self._manager.all_steps()) if self._folder.is_dir() else []

    def latest_step(self) -> int | None:
        """The last of them."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, trees: Mapping[str, Any], extras: Mapping[str, Any], *, in_background: bool = False
    ) -> None:
        """Writes one checkpoint.

        Args:
          step: its number; one that exists already is left as it is.
          trees: name -> pytree of arrays, each taken to the host, or written by the processes that have its parts.
          extras: JSON-able.
          in_background: comes back when all is copied; `wait` says how it ended. Several processes do not come back
            before all of them have written, so that none goes on alone.

        Raises:
          UserError: it could not be written (a full disk, say); earlier checkpoints stay.
        """
        if step in self.steps():
            return
        manager = self._manager
        trees = {name: jax.tree.map(_as_written, tree) for name, tree in trees.items()}
        record = {
            "sha256": {name: tree_sha256(tree) for name, tree in trees.items()},
            "extras": dict(extras),
        }
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            # Asked first, because a write that fails half-way makes orbax's threads print their own tracebacks.
            raise self._not_written(step, f"it needs {needed:,} bytes, and {free:,} are free")
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        args = ocp.args.Composite(**items, record=ocp.args.JsonSave(record))
        self._write(step, lambda: manager.save(step, args=args))
        self._writing = step
        if not in_background or process_count() > 1:
            self.wait()

    def wait(self) -> None:
        """Comes back when the checkpoint that is being written, if one is, is whole.

        Raises:
          UserError: it could not be written; earlier checkpoints stay.
        """
        step, self._writing = self._writing, None
        if step is not None:
            self._write(step, self._manager.wait_until_finished)

    def _write(self, step: int, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # orbax passes on whatever its storage layers raise
            for leftover in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
            self._manager.reload()  # it has forgotten the one that this should have replaced
            raise self._not_written(step, reason(error)) from error

    def _not_written(self, step: int, cause: str) -> UserError:
        last_good = self.latest_step()
        kept = "no earlier checkpoint exists" if last_good is None else f"the one of step {last_good} is kept"
        return UserError(
            f"The checkpoint of step {step} could not be written to {self._folder} ({cause}); {kept}: "
            "free some disk space and run the same command again."
        )

    def remove_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def restore(
        self, templates: Mapping[str, Any], step: int | None = None
    ) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """The newest checkpoint, or that of a step, as (step, trees on the host, extras).

        Args:
          templates: the trees to read, each with a pytree of its structure (arrays or `jax.ShapeDtypeStruct`), or
            None for nested dicts as saved. Leaves come to the host, but for those whose template lies on devices of
            other processes, too: these lie where it does.

        Raises:
          DamagedCheckpoint: it is damaged, or does not fit the templates.
          UserError: there is no checkpoint.
        """
        step = self.latest_step() if step is None else step
        if step is None:
            raise UserError(f"{self._folder} holds no checkpoint: run ragjax.train on this run folder first.")
        try:
            items = {name: ocp.args.StandardRestore(self._template(step, name, templates[name])) for name in templates}
            restored = self._manager.restore(step, args=ocp.args.Composite(**items, record=ocp.args.JsonRestore()))
        except Exception as error:
            raise DamagedCheckpoint(self._folder / str(step), f"cannot be read ({reason(error)})") from error
        trees = {name: restored[name] for name in templates}
        for name, tree in trees.items():
            # Orbax minds the template's names, not its shapes.
            if templates[name] is not None and _shapes(tree) != _shapes(templates[name]):
                raise DamagedCheckpoint(
                    self._folder / str(step), f"holds {name} arrays of other shapes than this run's"
                )
            if tree_sha256(tree) != restored["record"]["sha256"].get(name):
                raise DamagedCheckpoint(self._folder / str(step), "does not have the hash that was stored with it")
        return step, trees, restored["record"]["extras"]

    def _template(self, step: int, name: str, tree: Any) -> Any:
        """Says leaf by leaf where it goes: left to itself, orbax asks for the devices that a tree was saved from."""
        if tree is None:
            folder = self._folder / str(step) / name
            tree = ocp.StandardCheckpointHandler().metadata(folder).tree  # ty: ignore[invalid-argument-type]
        return jax.tree.map(_as_read, tree)

    def restore_newest(self, templates: Mapping[str, Any]) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """`restore` of the newest checkpoint that is whole, to go on from there.

        Later ones are then deleted, which is said: what goes on will write them again.

        Raises:
          UserError: none is whole, or none fits the templates; they stay as they are.
        """
        damages: list[DamagedCheckpoint] = []
        for step in reversed(self.steps()):
            found = damage = None
            try:
                found = self.restore(templates, step)
            except DamagedCheckpoint as error:
                damage = error
            # Each process may have read another part of it.
            if largest_of_all(found is None) or found is None:
                damages.append(damage or DamagedCheckpoint(self._folder / str(step), "is damaged"))
                continue
            for damage in damages:
                warn(f"{damage.fault}, so it is deleted and the one of step {step} is used.")
            self.remove_after(step)
            return found
        if damages:
            raise UserError(
                f"{damages[0].fault}, and no other is left in {self._folder}: delete that folder to start from step 0."
            )
        return self.restore(templates)  # says that there is none


def _as_written(leaf: Any) -> Any:
    return np.asarray(jax.device_get(leaf)) if lies_here(leaf) else leaf


def _as_read(leaf: Any) -> Any:
    return np.empty(leaf.shape, leaf.dtype) if lies_here(leaf) else leaf


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in jax.tree.leaves(tree)]


def tree_sha256(tree: Any) -> str:
    """A hash of a tree's names, types, shapes and values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaf = np.asarray(to_host(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()
