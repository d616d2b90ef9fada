"""Run folders written by hand: what training would leave in them, without a training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ragjax.config import RunConfig
from ragjax.costs import PARTS, TRAINING_PARTS
from ragjax.evaluation import METRICS, paired_interval
from ragjax.files import append_line, write_atomic
from ragjax.metrics import mean_of_defined
from ragjax.reporting import Cell
from ragjax.runs import RunFolder, RunRecord, Summary

STRATEGY = {"rag_token": ("joint", "rag_token"), "rag_sequence": ("joint", "rag_sequence")}
INPUTS = {
    "embedder": {"source": "minilm: weight package, sha256 53aa5117..., not quantised", "sha256": "53aa" * 16},
    "generator": {"source": "smollm2-135m: weight package, sha256 b179c952..., not quantised", "sha256": "b179" * 16},
    "data": {"name": "sample", "sha256": "c0de" * 16},
}


def line(number: int, f1: float | None, recall: float | None, **changes: Any) -> dict[str, Any]:
    """One question's prediction; EM is 1 where F1 is."""
    em = None if f1 is None else float(f1 == 1.0)
    return {
        "id": f"q{number}",
        "question": f"Question {number}?",
        "prediction": None if f1 is None else f"answer {f1:g}",
        "answers": [f"accepted {number}"],
        "em": em,
        "f1": f1,
        "contains": em,
        "recall_at_5": recall,
        "hit_at_5": None if recall is None else float(recall > 0),
        "passages": [{"id": f"p{number}", "probability": 0.75}, {"id": "p0", "probability": 0.25}],
    } | changes


def write_run(
    folder: Path,
    row: str,
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    seconds: Mapping[str, float] | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
    kept: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] = INPUTS,
    **flags: Any,
) -> Cell:
    """A finished run. before, after: lines of predictions. seconds: by part, 10 s where it is not given."""
    strategy, objective = STRATEGY.get(row, (row, "rag_token"))
    config = RunConfig(strategy=strategy, objective=objective, seed=seed, run_dir=str(folder), **flags)
    files = RunFolder(folder)
    versions = {"ragjax": "0.1.0", "jax": "0.10.2"}
    files.begin(RunRecord(config, ("phase",), inputs), {"phase": {"generator": 2e-4}}, {}, versions, ["cpu"])
    for moment, lines in (("before", before), ("after", after)):
        if moment == "before" or strategy != "none":
            write_atomic(files.measured("test", moment), "".join(json.dumps(x) + "\n" for x in lines))
    for each in metrics:
        append_line(files.metrics_file, json.dumps(each))
    took = dict.fromkeys(PARTS, 10.0) | dict(seconds or {})
    parts = {part: {"seconds": took[part], "flops": 1e9, "tokens": 100, "backward_tokens": 0} for part in PARTS}
    means = [{name: mean_of_defined(x[name] for x in lines) for name in METRICS} for lines in (before, after)]
    summary = Summary(
        strategy=strategy,
        objective=objective,
        split="test",
        n=len(before),
        before=means[0],
        after=means[1],
        change_95={name: paired_interval([x[name] for x in before], [x[name] for x in after]) for name in METRICS},
        cost={
            "seconds": sum(took[part] for part in TRAINING_PARTS),
            "flops": 4e9,
            "tokens": 400,
            **parts,
            "phases": {},
        },
        peak_memory_bytes=1 << 30,
        retrieval={},
        kept=kept or {},
    )
    files.write_summary(summary)
    return Cell(row, config.embedder, config.generator, seed, files)
