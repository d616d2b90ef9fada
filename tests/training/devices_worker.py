"""Run in a process of its own with 8 virtual CPU devices: each case on 1 and on 8 devices, results to a .npz file.

A checkpoint of the first case's state on 8 devices goes into the folder `checkpoints` beside that.

An optimizer that passes gradients through keeps the last ones as its state, so that they are compared as they were
reduced and not as differences of parameters.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import optax

from ragjax.checkpoints import Checkpoints
from ragjax.data.batches import Shape
from ragjax.parallel import Replicated
from ragjax.training.state import init_state
from ragjax.training.step import make_train_step
from tests.tiny_modules import stacked_batch
from tests.training.cases import CASES, examples_of, objective_of, split

STEPS = 3


def recording_sgd() -> optax.GradientTransformation:
    return optax.GradientTransformation(
        init=lambda params: jax.tree.map(np.zeros_like, params), update=lambda gradients, *_: (gradients, gradients)
    )


def run(case: str, devices: int, folder: Path) -> dict[str, np.ndarray]:
    settings = CASES[case]
    objective, variables = objective_of(case)
    trainable, frozen = split(case, variables)
    local = Replicated(jax.local_devices()[:devices])
    make = make_train_step(objective, recording_sgd(), STEPS, 0.0, settings["reduction"], seed=3)
    step = local.compile_step(make)
    rates = {"embedder": 0.01, "generator": 0.01}
    state = local.place(init_state(trainable, rates, recording_sgd()), donated=True)
    frozen = local.place(frozen)
    results = {}
    for number in range(STEPS):
        # Five questions: on eight devices three of them hold fillers only.
        batch = stacked_batch(examples_of(case, seed=number), devices, 1, Shape(15, 64, 8))
        state, metrics = step(state, frozen, batch)
        if number == 0:
            results |= named("gradient", state.optimizer)
            results |= {f"metric {name}": np.asarray(value) for name, value in metrics.items()}
    if devices == 8 and case == next(iter(CASES)):
        Checkpoints(folder).save(STEPS, {"trainable": state.trainable, "optimizer": state.optimizer}, {})
    return results | named("parameter", state.trainable)


def named(kind: str, tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {
        f"{kind} {jax.tree_util.keystr(path, simple=True, separator='/')}": np.asarray(leaf) for path, leaf in leaves
    }


def main(out: str) -> None:
    assert jax.local_device_count() == 8
    results = {
        f"{case} {devices} {name}": value
        for case in CASES
        for devices in (1, 8)
        for name, value in run(case, devices, Path(out).with_name("checkpoints")).items()
    }
    np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1])
