"""Run folders as training leaves them, with random weights in the place of trained ones: nothing is compiled."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ragjax.checkpoints import Checkpoints
from ragjax.config import RunConfig
from ragjax.data.dataset import load_dataset
from ragjax.runs import RunFolder, RunRecord, Summary
from ragjax.weights import resolve_model

SCORES = {"em": 0.25, "f1": 0.5, "contains": 0.25, "recall_at_5": 1.0, "hit_at_5": 1.0}


def write_run(
    folder: str | os.PathLike,
    config: RunConfig,
    trained: Mapping[str, Mapping[str, Mapping[str, Any]]],
    finished: bool = True,
) -> Path:
    """A run folder with one checkpoint, of step 7, for each phase of `trained`: {phase: {model: {collection: tree}}}.

    A phase that trained nothing, {}, has none yet. Unless `finished`, there is no summary.json.
    """
    folder = Path(folder)
    inputs = {
        name: {"sha256": resolve_model(getattr(config, name)).sha256, "source": "in words"}
        for name in ("embedder", "generator")
    }
    data = load_dataset(config.data)
    inputs["data"] = {"name": data.name, "sha256": data.sha256}
    files = RunFolder(folder)
    files.begin(RunRecord(config, tuple(trained), inputs), learning_rates={}, index={}, versions={}, devices=[])
    for phase, models in trained.items():
        if models:
            Checkpoints(files.checkpoints(phase)).save(7, {"trainable": models}, {})
    if finished:
        scores = {"n": 6, "before": SCORES, "after": SCORES | {"em": 0.75}}
        rest = {"strategy": config.strategy, "objective": config.objective, "split": "test"}
        files.write_summary(Summary(**rest, **scores, cost={}, peak_memory_bytes=0, retrieval={}))
    return folder


def nudged(params: Any, seed: int = 1) -> Any:
    """The same tree in float32 with other values, near those that it had."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (np.asarray(leaf) * (1 + 0.02 * rng.standard_normal(leaf.shape))).astype(np.float32), params
    )


def random_adapters(params: Mapping[str, Any], rank: int, targets: tuple[str, ...], seed: int = 2) -> dict[str, Any]:
    """Adapters for the matrices named in `targets`, large enough to change every logit: {"layers": ...}."""
    rng = np.random.default_rng(seed)

    def visit(tree: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        for name, part in tree.items():
            if name in targets:
                layers, width, features = part["kernel"].shape
                lora_a = rng.standard_normal((layers, width, rank)) * width**-0.5
                lora_b = rng.standard_normal((layers, rank, features)) * 0.05
                found[name] = {"lora_a": lora_a.astype(np.float32), "lora_b": lora_b.astype(np.float32)}
            elif isinstance(part, Mapping) and (inside := visit(part)):
                found[name] = inside
        return found

    return visit(params)
