"""Run in a process of its own with 8 virtual CPU devices: the same steps on one device, replicated and on meshes.

python -m tests.training.mesh_worker OUT.npz FOLDER     FOLDER: a world of tests/tiny_runs.py
"""

import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from ragjax.arrays import ModelVariables
from ragjax.data.batches import ScoredBatch, Shape
from ragjax.dry_run.lengths import find_lengths
from ragjax.dry_run.needs import PlannedStep
from ragjax.dry_run.shapes import shaped_models
from ragjax.meshes import read_mesh
from ragjax.models.lora import LoraConfig
from ragjax.models.quantize import quantize
from ragjax.parallel import Arrangement, Replicated, Sharded, arrange, join_copies, make_mesh, stack_copies
from ragjax.pretrained import load_generator
from ragjax.rates.stacked import _question_losses
from ragjax.runs import Run, prepare
from ragjax.training.loop import Trainer, train_phase
from ragjax.training.objectives import AnswerMixture, ConcatenatedObjective, LikelihoodObjective, Objective
from ragjax.training.records import MetricsLog
from ragjax.training.state import init_state, make_optimizer
from ragjax.training.step import make_eval_step, make_train_step
from ragjax.training.strategies import STRATEGIES
from ragjax.weights import axes_of
from tests.tiny_modules import random_examples, stacked_batch, tiny_bert, tiny_decoder, tiny_objective
from tests.tiny_runs import World
from tests.training.devices_worker import named

STEPS, QUESTIONS = 5, 8
MESHES = {"fsdp": "fsdp:8", "all": "data:2,fsdp:2,tensor:2"}
LORA = LoraConfig(rank=3, alpha=6.0)
RATE = 0.02


def arrangement(name: str) -> Arrangement:
    if name in MESHES:
        return arrange("mesh", read_mesh(MESHES[name]), axes_of)
    return Replicated(jax.local_devices()[: 1 if name == "one" else 8])


def joint() -> tuple[Objective, ModelVariables, ModelVariables]:
    """(objective, trainable, frozen): both models, the generator's adapters."""
    # Dropout is on: its pattern belongs to the token, not to the device.
    lora = dataclasses.replace(LORA, dropout=0.3)
    objective, variables = tiny_objective("rag_token", dropout=True, lora=lora, remat="partial")
    generator = variables["generator"]
    trainable = {"embedder": variables["embedder"], "generator": {"lora": generator["lora"]}}
    return objective, trainable, {"generator": {"params": generator["params"]}}


def all_weights() -> tuple[Objective, ModelVariables, ModelVariables]:
    module, variables = tiny_decoder(2)
    return ConcatenatedObjective(module), {"generator": variables}, {}


def quantised(kind: str) -> tuple[Objective, ModelVariables, ModelVariables]:
    """Adapters over quantised layers."""
    module, variables = tiny_decoder(2, lora=LORA, hidden_size=64, head_dim=16)
    layers = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.vmap(lambda k: quantize(k, kind))(leaf) if path[-1].key == "kernel" else leaf,
        variables["params"]["layers"],
    )
    objective = ConcatenatedObjective(module.clone(config=dataclasses.replace(module.config, quantize=kind)))
    frozen = {"generator": {"params": variables["params"] | {"layers": layers}}}
    return objective, {"generator": {"lora": variables["lora"]}}, frozen


CASES = {
    "joint": joint,
    "full": all_weights,
    "nf4": functools.partial(quantised, "nf4"),
}


def steps(case: str, devices: Arrangement) -> dict[str, np.ndarray]:
    """The parameters after five steps of plain SGD with two micro-batches each, and the last metrics."""
    objective, trainable, frozen = CASES[case]()
    # Plain steps: Adam divides by a gradient's size, which would make noise of what is zero but for rounding.
    sgd = optax.identity()
    make = make_train_step(objective, sgd, STEPS, 0.0, "sum", seed=3)
    state = devices.place(init_state(trainable, dict.fromkeys(trainable, RATE), sgd), donated=True)
    frozen = devices.place(frozen)
    metrics: Mapping[str, Any] = {}
    step, gathered = devices.compile_step(make), {}
    if case == "joint" and isinstance(devices, Sharded):
        jitted = devices.jit_step(make(devices.reducer))
        batch = devices.place_batch(batch_of(case, devices.groups, 0), 1)
        compiled = jitted.lower(state, frozen, batch).compile()
        gathered = {"gathered": np.array(re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", compiled.as_text()))}

        def step(state: Any, frozen: Any, batch: Any) -> Any:
            return compiled(state, frozen, devices.place_batch(batch, 1))

    for number in range(STEPS):
        state, metrics = step(state, frozen, batch_of(case, devices.groups, number))
    results = named("parameter", state.trainable) | {f"metric {name}": np.asarray(m) for name, m in metrics.items()}
    results |= gathered
    if case == "full":
        sums = devices.compile_sums(make_eval_step(objective))
        results |= named("sum", sums(state.trainable, frozen, batch_of(case, devices.groups, STEPS)))
    return results


def batch_of(case: str, groups: int, seed: int, micro_batches: int = 2) -> Any:
    examples = random_examples(QUESTIONS, seed, passages=3 if case == "joint" else 1)
    return stacked_batch(examples, groups, micro_batches, Shape(3 * QUESTIONS // groups, 32, 8))


def copies(devices: Arrangement) -> dict[str, np.ndarray]:
    """Two copies of the embedder at two rates, each with questions of its own, and the losses that they end with."""
    embedder, variables = tiny_bert(1)
    objective, sgd = LikelihoodObjective(embedder, AnswerMixture("rag_token", score_scale=5.0)), optax.identity()
    step = devices.compile_copies(make_train_step(objective, sgd, 2, 0.0, "sum", seed=3))
    states = [init_state({"embedder": variables}, {"embedder": rate}, sgd) for rate in (RATE, 3 * RATE)]
    state = devices.place(jax.tree.map(lambda *leaves: np.stack(leaves), *states))
    for number in range(2):
        batch = stack_copies([scored_batch(devices.groups, seed) for seed in (number, number + 10)])
        state, _ = step(state, {}, batch)
    losses, _ = devices.compile_map(_question_losses(objective))(state.trainable, batch)
    return named("parameter", state.trainable) | {"losses": join_copies(np.asarray(losses))}


def scored_batch(groups: int, seed: int) -> ScoredBatch:
    """[groups, one micro-batch, ...] of eight questions."""
    batch, rng = batch_of("joint", groups, seed, micro_batches=1), np.random.default_rng(seed)
    mask = batch.rows.answer_mask
    scores = rng.normal(-2.0, 1.0, (QUESTIONS, 3, mask.shape[-1])).astype(np.float32)
    scores = scores.reshape(*mask.shape[:3], 3, mask.shape[-1])
    return ScoredBatch(batch.question_tokens, batch.question_lengths, batch.passage_vectors, scores, mask)


def first_adam_step(devices: Arrangement) -> dict[str, np.ndarray]:
    """In bfloat16, of adapters whose B is zero: a gradient's sign is all that counts."""
    module, variables = tiny_decoder(2, lora=LORA, dtype="bfloat16")
    lora = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.zeros_like(leaf) if path[-1].key == "lora_b" else leaf, variables["lora"]
    )
    adam = make_optimizer(1.0, 0.0)
    step = devices.compile_step(make_train_step(ConcatenatedObjective(module), adam, 1, 0.0, "sum", seed=3))
    state = init_state({"generator": {"lora": lora}}, {"generator": 1e-3}, adam)
    frozen = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), {"generator": {"params": variables["params"]}})
    # A question each, on eight devices or one after another: what is rounded to bfloat16 within one is the same.
    batch = batch_of("concat", 8, 0, micro_batches=1)
    if devices.groups == 1:
        batch = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), batch)
    state, _ = step(devices.place(state, donated=True), devices.place(frozen), batch)
    moments = named("moment", state.optimizer["generator"][1].mu)
    return named("parameter", state.trainable) | {name: leaf for name, leaf in moments.items() if "lora_b" in name}


def a_run_that_moves(world: World) -> dict[str, np.ndarray]:
    """The state that a step on a mesh leaves in its checkpoint, and that runs go on with elsewhere."""
    (phase,), flags = STRATEGIES["generator"], {"strategy": "generator", "objective": "concat_nll", "dev_every": 0}
    flags |= {"batch_size": 8, "max_steps": 2}
    on_mesh = {where: {"parallelism": "mesh", "mesh": mesh} for where, mesh in MESHES.items()}
    run = prepare(world.config(world.folder / "run", **flags, **on_mesh["all"]))
    results = while_sharded(run) | named("trained", train_phase(run, phase, stop_at=1).trained)
    for where, changes in {"pmap": {}, **on_mesh}.items():
        config = world.config(world.folder / "run", **flags, **changes)
        moved = prepare(config, run.dataset)
        with contextlib.closing(MetricsLog(run.files)) as log:
            trainer = Trainer(moved, phase, log)
        state = trainer.state
        results |= named(where, {"trainable": state.trainable, "optimizer": state.optimizer, "step": state.step})
        leaf = state.optimizer["generator"][1].mu["lora"]["layers"]["mlp"]["up_proj"]["lora_b"]
        results[f"moment's share {where}"] = np.array([leaf.addressable_shards[0].data.size, leaf.size])
        models = shaped_models(config, with_generator=True)
        planned = PlannedStep(
            phase, models, find_lengths(config, models.embedder, models.generator, 3), moved.arrangement
        )
        held, counters = planned.held, state._replace(trainable={})
        results[f"planned {where}"] = np.array([held.parameters + held.adapters, held.optimizer, held.untrained])
        placed = ((trainer.frozen, state.trainable), counters, state.trainable)
        results[f"placed {where}"] = np.array([bytes_on_first_device(tree) for tree in placed])
        if where == "pmap":
            results["summed"] = np.array(planned.needs().collectives["all-reduce"].bytes)
    return results


def bytes_on_first_device(tree: Any) -> int:
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.local_devices()[0])


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
    # That eight replicated devices agree with one, tests/training/devices_worker.py shows.
    for case, arrangements in {"joint": ("pmap", "all"), "full": ("one", "fsdp"), "nf4": ("one", "all")}.items():
        for name in arrangements:
            yield f"{case} {name}", steps(case, arrangement(name))
    for name in ("one", "all"):
        yield f"copies {name}", copies(arrangement(name))
    permuted = [jax.local_devices()[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)]
    yield "adam permuted", first_adam_step(Sharded(make_mesh({"data": 4, "fsdp": 2}, permuted), axes_of))
    yield "adam one", first_adam_step(arrangement("one"))
    yield "run", a_run_that_moves(world)


def main(out: str, folder: str) -> None:
    assert jax.local_device_count() == 8
    base = Path(folder)
    world = World(base, base / "bert", base / "llama", base / "data")
    results = {f"{case} {name}": value for case, values in everything(world) for name, value in values.items()}
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
