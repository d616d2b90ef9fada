"""Learning from answers, phase 2 over one tuned generator: the embedder's rate and what else moves it, on dev.

    python -m ragjax.train --strategy=generator --data=$RAGJAX_DATA/popqa --max_steps=75 --run_dir=GENERATOR
    python experiments/benchmarks/answer_rates.py --data=$RAGJAX_DATA/popqa --generator_run=GENERATOR \
        --work=runs/answer_rates.popqa --out=experiments/results/answer_rates.popqa.json

Each variant is a learning-rate search whose copies end with their last state. All variants share one file of
likelihoods, so what the generator has read for one it does not read again for the next. Losses of different objectives
are not comparable; Recall@5, over all dev questions, is. Variants that stand in the file are not run again.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from provenance import provenance

from ragjax.config import RunConfig, SearchConfig
from ragjax.evaluation import mean_recall
from ragjax.files import write_json
from ragjax.rates import search_rates
from ragjax.runs import RunFolder, prepare

STEPS = 75
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "two epochs": {"max_steps": 2 * STEPS},
    "emdr2": {"retriever_objective": "emdr2"},
    "pdist": {"retriever_objective": "pdist"},
    "mean over tokens": {"loss_reduction": "mean"},
    "scale 10": {"score_scale": 10.0},
    "scale 50": {"score_scale": 50.0},
    "K = 10": {"top_k": 10},
    "K = 20": {"top_k": 20},
    "loop": {"retriever_objective": "loop"},
}
FIGURES = ("start_loss", "dev_loss", "dev_loss_change_se", "recall_at_5", "diverged")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--generator_run", required=True, help="finished run of the strategy generator")
    parser.add_argument("--rates", default="1e-6,3e-6,1e-5,3e-5,1e-4", help="separated by commas")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="separated by commas")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the searches, which go on where they stopped"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after each variant")
    flags = parser.parse_args()
    base = RunConfig(
        strategy="two_phase",
        data=flags.data,
        generator_run=flags.generator_run,
        decode="none",
        max_steps=STEPS,
        batch_size=4,
        dev_limit=100,
    )
    options = SearchConfig(embedder_rates=flags.rates, select="dev_loss")
    run = prepare(base)
    dev = run.dataset.dev
    found = run.retrieve([question.question for question in dev], 5).passage_rows
    result = json.loads(flags.out.read_text()) if flags.out.exists() else {"variants": {}}
    result |= {
        **provenance(),
        "data": {"name": run.dataset.name, "sha256": run.dataset.sha256, "dev_questions": len(dev)},
        "models": [run.embedder.describe(), run.generator.describe()],
        "recall_at_5_before": mean_recall(run.pipeline.store, dev, found),
    }
    likelihoods = RunFolder(flags.work / "shared").likelihoods_file
    likelihoods.parent.mkdir(parents=True, exist_ok=True)
    for name in flags.variants.split(","):
        if name in result["variants"]:
            continue
        files = RunFolder(flags.work / name.replace(" ", "-"))
        files.path.mkdir(exist_ok=True)
        if likelihoods.exists() and not files.likelihoods_file.exists():
            shutil.copy(likelihoods, files.likelihoods_file)
        config = dataclasses.replace(base, run_dir=str(files.path), **VARIANTS[name])
        search = search_rates(config, options, run)
        shutil.copy(files.likelihoods_file, likelihoods)
        result["variants"][name] = {
            "flags": VARIANTS[name],
            "pairs_scored": search["pairs_scored"],
            "rates": {
                f"{trial['rates']['embedder']:g}": {figure: trial[figure] for figure in FIGURES}
                for trial in search["trials"]
            },
        }
        write_json(flags.out, result)
        print(name, json.dumps(result["variants"][name]["rates"]), flush=True)


if __name__ == "__main__":
    main()
