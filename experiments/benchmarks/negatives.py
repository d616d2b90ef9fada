"""What a negative is: the embedder's labels phase under several filters and numbers of hard negatives, on dev.

    python experiments/benchmarks/negatives.py --data=$RAGJAX_DATA/popqa --out=experiments/results/negatives.popqa.json

One epoch over the training questions, the last state measured (--keep=last), so that the table shows what training
does and not what the safety net catches. Variants that stand in the file already are not trained again.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from provenance import provenance

from ragjax.config import RunConfig
from ragjax.files import write_json
from ragjax.runs import Run, RunFolder, prepare
from ragjax.training.health import RetrievalHealth
from ragjax.training.loop import train_phase
from ragjax.training.strategies import STRATEGIES

(RANKING,) = STRATEGIES["embedder"]
VARIANTS: dict[str, dict[str, Any]] = {
    "0 hard, labels": {"hard_negatives": 0, "negative_filter": "labels"},
    "5 hard, labels": {"hard_negatives": 5, "negative_filter": "labels"},
    "0 hard, gist": {"hard_negatives": 0, "negative_filter": "gist"},
    "5 hard, gist": {"hard_negatives": 5, "negative_filter": "gist"},
    "5 hard, gist, margin 0.05": {"hard_negatives": 5, "negative_filter": "gist", "negative_margin": 0.05},
    "5 hard, gist, margin 0.1": {"hard_negatives": 5, "negative_filter": "gist", "negative_margin": 0.1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample")
    parser.add_argument("--rates", default="2e-5", help="embedder rates, separated by commas")
    parser.add_argument("--seeds", default="0", help="separated by commas")
    parser.add_argument("--variants", default="", help="only those with this in their name")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after each training")
    flags = parser.parse_args()
    start = prepare(RunConfig(strategy="embedder", data=flags.data, keep="last"), with_generator=False)
    result = json.loads(flags.out.read_text()) if flags.out.exists() else {"trained": []}
    result |= {
        **provenance(),
        "data": {"name": start.dataset.name, "sha256": start.dataset.sha256, "questions": len(start.dataset.train)},
        "embedder": start.embedder.describe(),
        "before": found_by(start),
    }
    for seed in map(int, flags.seeds.split(",")):
        for rate in map(float, flags.rates.split(",")):
            for name, changes in VARIANTS.items():
                key = {"variant": name, "rate": rate, "seed": seed}
                if flags.variants not in name or any(key.items() <= line.items() for line in result["trained"]):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    flags_of_it = {
                        **changes,
                        "embedder_lr": rate,
                        "seed": seed,
                        "dev_every": 0,
                        "checkpoint_every": 10**6,
                    }
                    config = dataclasses.replace(start.config, **flags_of_it)
                    run = dataclasses.replace(start, config=config, files=RunFolder(Path(folder)))
                    trained = train_phase(run, RANKING).trained
                line = key | found_by(start.with_trained(jax.tree.map(jnp.asarray, trained)))
                result["trained"].append(line)
                write_json(flags.out, result)
                print(line, flush=True)


def found_by(run: Run) -> dict[str, float]:
    """Recall@5 and MRR@10 on the dev questions."""
    figures = RetrievalHealth(run.pipeline, run.dataset.dev, 5).measure(run.embedder.variables).figures
    return {name: figures[name] for name in ("recall_at_5", "mrr_at_10")}


if __name__ == "__main__":
    main()
