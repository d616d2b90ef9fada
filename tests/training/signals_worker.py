"""Run in a process of its own with 8 virtual CPU devices: kept likelihoods, steps of ranking and of drawn passages.

The tests call the same functions on one device.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ragjax.arrays import ModelVariables
from ragjax.costs import Ledger
from ragjax.data.dataset import Dataset, load_dataset
from ragjax.models.lora import LoraConfig
from ragjax.parallel import Replicated
from ragjax.pipeline import Pipeline, build_pipeline, load_models
from ragjax.pretrained import Generator, init_lora, load_generator
from ragjax.runs import Run
from ragjax.training.answer_scorer import AnswerScorer, RowLimits
from ragjax.training.likelihood_cache import LikelihoodCache
from ragjax.training.loop import split_trainable
from ragjax.training.signals import RankingAssembler
from ragjax.training.state import init_state
from ragjax.training.step import make_train_step
from ragjax.training.strategies import STRATEGIES
from tests.tiny_runs import World, batch_of, run_of
from tests.training.devices_worker import named, recording_sgd

LIMITS = RowLimits(row_length=128, prompts_per_row=16, usual_answer=8, longest_answer=16)
RANKING = {
    "ranking_batch_size": 5,
    "hard_negatives": 2,
    "negative_filter": "gist",
    "negative_margin": 0.0,
    "dev_every": 0,
}
(JOINT,) = STRATEGIES["joint"]


def random_adapters(lora: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
    """Adapters of which neither factor is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jax.numpy.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype), lora)


class Scorer:
    """A cache over a generator's scorer, which is asked with that generator's own variables."""

    def __init__(self, generator: Generator, limits: RowLimits, path: Path):
        self.cache = LikelihoodCache(AnswerScorer(generator, limits, Replicated()), path)
        self._variables = Replicated().place(generator.variables)

    def score(self, prompts: Any, answers: Any) -> Any:
        return self.cache.score(self._variables, prompts, answers)

    def rewind(self, position: int) -> None:
        self.cache.rewind(position)

    @property
    def position(self) -> int:
        return self.cache.position

    def __len__(self) -> int:
        return len(self.cache)


def placed(run: Run) -> ModelVariables:
    """Both models' variables as they are."""
    return Replicated().place({"embedder": run.embedder.variables, "generator": run.generator.variables})


def pairs_of(generator: Generator) -> tuple[list[list[int]], list[list[int]]]:
    """Seventy prompts of 8 to 60 tokens, with answers of 1 to 4 tokens and a few of 9 to 14."""
    rng = np.random.default_rng(5)
    size = generator.config.vocab_size
    prompts = [rng.integers(0, size, rng.integers(8, 60)).tolist() for _ in range(70)]
    lengths = [9 + i % 6 if i % 20 == 7 else 1 + i % 4 for i in range(70)]
    return prompts, [rng.integers(0, size, length).tolist() for length in lengths]


def labelled(dataset: Dataset) -> Dataset:
    """Twelve training questions: some with two positives, some with one of another question, some unlabelled."""
    positives = [("p3", "p1"), ("p1",), ("p2", "p8", "p3"), (), ("p4",), ("p0",), (), ("p7",), ("p4", "p20"), ("p9",)]
    train = [
        dataclasses.replace(question, positive_ids=ids)
        for question, ids in zip(dataset.train, [*positives, ("p10",), ()], strict=True)
    ]
    return dataclasses.replace(dataset, train=train)


def ranking_pipeline(world: World) -> tuple[Dataset, Pipeline]:
    dataset, config = labelled(load_dataset(world.data)), world.config("unused")
    return dataset, build_pipeline(config, dataset, *load_models(config), show_progress=False)


def ranking_step(world: World, dataset: Dataset, pipeline: Pipeline, accumulation: int) -> dict[str, np.ndarray]:
    """Metrics and gradients of the first five labelled questions, on all devices."""
    config = world.config("unused", **RANKING, gradient_accumulation=accumulation)
    assembler = RankingAssembler(run_of(config, pipeline, dataset))
    asked = batch_of(assembler, assembler.sampler.train[:5])
    batch = assembler.assemble(asked, {"embedder": pipeline.embedder.variables}, Ledger()).batch
    devices = Replicated()
    step = devices.compile_step(make_train_step(assembler.objective, recording_sgd(), 4, 0.0, "sum", seed=3))
    state = init_state({"embedder": pipeline.embedder.variables}, {"embedder": 0.0}, recording_sgd())
    frozen = devices.place({"generator": {}})
    state, metrics = step(devices.place(state, donated=True), frozen, batch)
    return named("gradient", state.optimizer) | {f"metric {name}": np.asarray(m) for name, m in metrics.items()}


def drawn_step(world: World, objective: str) -> dict[str, np.ndarray]:
    """What is drawn for the first five questions, and the metrics and gradients of a step on it, on all devices."""
    config = world.config("unused", objective=objective, batch_size=5, backward_passages=1, score_scale=5.0, seed=2)
    dataset = load_dataset(world.data)
    pipeline = build_pipeline(config, dataset, *load_models(config), show_progress=False)
    pipeline = pipeline.with_trained({"generator": {"lora": random_adapters(pipeline.generator.lora, 1)}})
    run = run_of(config, pipeline, dataset)
    assembler = JOINT.signal.make_assembler(run, JOINT.trains)
    batch = assembler.assemble(assembler.sampler.training_batch(1), placed(run), Ledger()).batch
    seats = batch.scored.question_lengths > 0
    trainable, frozen = split_trainable(run, JOINT)
    step = run.arrangement.compile_step(make_train_step(assembler.objective, recording_sgd(), 4, 0.0, "sum", seed=3))
    state = init_state(trainable, {"embedder": 0.0, "generator": 0.0}, recording_sgd())
    state, metrics = step(run.arrangement.place(state, donated=True), run.arrangement.place(frozen), batch)
    return {
        "drawn": batch.drawn[seats],
        "weights": batch.weights[seats],
        **named("gradient", state.optimizer),
        **{f"metric {name}": np.asarray(value) for name, value in metrics.items()},
    }


def on_eight_devices(world: World) -> dict[str, np.ndarray]:
    """What this file computes in a process that has eight devices; once in a test session."""
    out = world.folder / "eight.npz"
    if not out.exists():
        # Nearly all of its time is compiling, and what is compared does not depend on how well that optimises.
        quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {quick} --xla_force_host_platform_device_count=8"
        environment = {**os.environ, "RAGJAX_CACHE": str(world.folder / "cache")}
        subprocess.run(
            [sys.executable, "-W", "error", "-m", "tests.training.signals_worker", str(world.folder), str(out)],
            cwd=Path(__file__).resolve().parents[2],
            env=environment | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            check=True,
            timeout=900,
        )
    with np.load(out) as results:
        return dict(results)


def main(folder: str, out: str) -> None:
    assert jax.local_device_count() == 8
    base = Path(folder)
    world = World(base, base / "bert", base / "llama", base / "data")
    generator = load_generator(world.generator, lora=LoraConfig(4, alpha=32.0))
    generator = dataclasses.replace(generator, lora=random_adapters(init_lora(generator, 0), 1))
    scores, _ = Scorer(generator, LIMITS, Path(out).with_suffix(".jsonl")).score(*pairs_of(generator))
    results = {f"scores {i}": score for i, score in enumerate(scores)}
    dataset, pipeline = ranking_pipeline(world)
    step = ranking_step(world, dataset, pipeline, accumulation=1)
    results |= {f"ranking {name}": value for name, value in step.items()}
    results |= {f"drawn {name}": value for name, value in drawn_step(world, "rag_token").items()}
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
