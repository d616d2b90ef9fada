"""Run in a process of its own with 8 virtual CPU devices: the same steps on one device, replicated and on meshes.

python -m tests.training.mesh_worker OUT.npz FOLDER     FOLDER: a world of tests/tiny_runs.py
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from ragjax.arrays import ModelVariables
from ragjax.data.batches import Shape
from ragjax.models.lora import LoraConfig
from ragjax.models.quantize import quantize
from ragjax.parallel import Arrangement, Replicated, Sharded, arrange, make_mesh, stack_copies
from ragjax.pretrained import load_generator
from ragjax.runs import Run, prepare
from ragjax.training.loop import train_phase
from ragjax.training.objectives import ConcatenatedObjective, Objective
from ragjax.training.state import init_state, make_optimizer
from ragjax.training.step import make_train_step
from ragjax.training.strategies import STRATEGIES
from ragjax.weights import axes_of
from tests.tiny_modules import random_examples, stacked_batch, tiny_decoder, tiny_objective
from tests.tiny_runs import World
from tests.training.devices_worker import named

STEPS, QUESTIONS = 5, 8
MESHES = {"fsdp": "fsdp:8", "all": "data:2,fsdp:2,tensor:2"}
LORA = LoraConfig(rank=3, alpha=6.0)
RATE = 0.02


def arrangement(name: str) -> Arrangement:
    if name in MESHES:
        sizes = dict(part.split(":") for part in MESHES[name].split(","))
        return arrange("mesh", {axis: int(size) for axis, size in sizes.items()}, axes_of)
    return Replicated(jax.local_devices()[: 1 if name == "one" else 8])


def models(case: str) -> tuple[Objective, ModelVariables, ModelVariables]:
    """(objective, trainable, frozen) of a case."""
    if case in ("nf4", "int8"):
        module, variables = tiny_decoder(2, lora=LORA, hidden_size=64, head_dim=16)
        layers = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.vmap(lambda k: quantize(k, case))(leaf) if path[-1].key == "kernel" else leaf,
            variables["params"]["layers"],
        )
        objective = ConcatenatedObjective(module.clone(config=dataclasses.replace(module.config, quantize=case)))
        frozen = {"generator": {"params": variables["params"] | {"layers": layers}}}
        return objective, {"generator": {"lora": variables["lora"]}}, frozen
    lora = LORA if case == "lora" else None
    objective, variables = tiny_objective("rag_token", lora=lora, remat="partial" if lora else "none")
    generator = variables["generator"]
    trained = "lora" if lora else "params"
    trainable = {"embedder": variables["embedder"], "generator": {trained: generator[trained]}}
    return objective, trainable, {"generator": {name: tree for name, tree in generator.items() if name != trained}}


def steps(case: str, devices: Arrangement) -> dict[str, np.ndarray]:
    """The parameters after five steps of plain SGD with two micro-batches each, and the last metrics."""
    objective, trainable, frozen = models(case)
    # Plain steps: Adam divides by a gradient's size, which would make noise of what is zero but for rounding.
    sgd = optax.identity()
    step = devices.compile_step(make_train_step(objective, sgd, STEPS, 0.0, "sum", seed=3))
    state = devices.place(init_state(trainable, dict.fromkeys(trainable, RATE), sgd), donated=True)
    frozen = devices.place(frozen)
    metrics: Mapping[str, Any] = {}
    for number in range(STEPS):
        state, metrics = step(state, frozen, batch_of(case, devices.groups, number))
    return named("parameter", state.trainable) | {f"metric {name}": np.asarray(m) for name, m in metrics.items()}


def batch_of(case: str, groups: int, seed: int) -> Any:
    examples = random_examples(QUESTIONS, seed, passages=1 if case in ("nf4", "int8") else 3)
    return stacked_batch(examples, groups, 2, Shape(3 * QUESTIONS // groups, 32, 8))


def copies(devices: Arrangement) -> dict[str, np.ndarray]:
    """Two copies of the embedder at two rates, each with questions of its own."""
    objective, trainable, frozen = models("lora")
    trainable, frozen = (
        {"embedder": trainable["embedder"]},
        {"generator": {**frozen["generator"], **trainable["generator"]}},
    )
    sgd = optax.identity()
    step = devices.compile_copies(make_train_step(objective, sgd, STEPS, 0.0, "sum", seed=3))
    states = [init_state(trainable, {"embedder": rate}, sgd) for rate in (RATE, 3 * RATE)]
    state = devices.place(jax.tree.map(lambda *leaves: np.stack(leaves), *states))
    frozen = devices.place(frozen)
    for number in range(2):
        batches = [batch_of("lora", devices.groups, seed) for seed in (number, number + 10)]
        state, _ = step(state, frozen, stack_copies(batches))
    return named("parameter", state.trainable)


def first_adam_step(devices: list[jax.Device]) -> dict[str, np.ndarray]:
    """In bfloat16, of adapters whose B is zero: a gradient's sign is all that counts."""
    module, variables = tiny_decoder(2, lora=LORA, dtype="bfloat16")
    lora = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.zeros_like(leaf) if path[-1].key == "lora_b" else leaf, variables["lora"]
    )
    sharded = Sharded(make_mesh({"data": 4, "fsdp": 2}, devices), axes_of)
    adam = make_optimizer(1.0, 0.0)
    step = sharded.compile_step(make_train_step(ConcatenatedObjective(module), adam, 1, 0.0, "sum", seed=3))
    state = init_state({"generator": {"lora": lora}}, {"generator": 1e-3}, adam)
    frozen = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), {"generator": {"params": variables["params"]}})
    state, _ = step(sharded.place(state, donated=True), sharded.place(frozen), batch_of("nf4", 8, 0))
    return named("parameter", state.trainable)


def a_run_that_moves(world: World) -> dict[str, np.ndarray]:
    """The same phase on all devices from start to end, and begun on a mesh, taken on by another, ended replicated."""
    (phase,) = STRATEGIES["joint"]
    results = {}
    for name, moves in (("stays", ["pmap"]), ("moves", ["all", "fsdp", "pmap"])):
        for number, where in enumerate(moves, start=1):
            flags = {"parallelism": "mesh", "mesh": MESHES[where]} if where in MESHES else {}
            config = world.config(world.folder / name, batch_size=8, max_steps=3, dev_every=0, **flags)
            run = prepare(config)
            found = train_phase(run, phase, stop_at=None if number == len(moves) else number)
            if where == "all":
                results |= while_sharded(run)
        results |= named(name, found.trained)
    return results


def while_sharded(run: Run) -> dict[str, np.ndarray]:
    """What a generator on a mesh says, and one that lies whole on one device."""
    plain = load_generator(run.config.generator, lora=run.generator.module.config.lora)
    prompts = ["Which number has the town", "The river runs past"]
    answers = {"sharded": run.generator, "whole": dataclasses.replace(plain, lora=jax.device_get(run.generator.lora))}
    results = {}
    for name, generator in answers.items():
        results[f"answers {name}"] = np.array(generator.generate(prompts, 4))
        results |= named(f"loaded {name}", generator.params)
    kernel = run.generator.params["layers"]["mlp"]["up_proj"]["kernel"]
    results["share"] = np.array([kernel.addressable_shards[0].data.size, kernel.size])
    return results


def everything(world: World) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    for case, names in {"lora": ("pmap", *MESHES), "full": ("all",), "nf4": ("all",), "int8": ("fsdp",)}.items():
        for name in ("one", *names):
            yield f"{case} {name}", steps(case, arrangement(name))
    for name in ("pmap", "all"):
        yield f"copies {name}", copies(arrangement(name))
    local = jax.local_devices()
    for name, devices in (("in order", local), ("permuted", [local[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)])):
        yield f"adam {name}", first_adam_step(devices)
    yield "run", a_run_that_moves(world)


def main(out: str, folder: str) -> None:
    assert jax.local_device_count() == 8
    base = Path(folder)
    world = World(base, base / "bert", base / "llama", base / "data")
    results = {f"{case} {name}": value for case, values in everything(world) for name, value in values.items()}
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
