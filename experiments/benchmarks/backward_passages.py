"""Whether --backward_passages pays: dev loss, wall-clock and memory of joint training, the exact gradient beside it.

    python experiments/benchmarks/backward_passages.py --data=$RAGJAX_DATA/hotpotqa --work=runs/backward_passages \\
        --out=experiments/results/backward_passages.hotpotqa.json

For each seed the two runs take a step in turn, so that a slow minute of the machine meets both. Their costs are ratios
of medians over steps, and of sums over the later half, which compiling is no part of; measurements on the dev questions
stand apart. Peak memory is that of a
process of its own that trains two steps, the first of which has the largest shape. Runs go on from their last
checkpoints, and what the file has is not done again. Some six hours on 2 cores.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from provenance import provenance

from ragjax.config import RunConfig
from ragjax.costs import peak_memory_bytes
from ragjax.files import read_json, write_json
from ragjax.runs import prepare
from ragjax.training.loop import Trainer
from ragjax.training.records import MetricsLog
from ragjax.training.strategies import STRATEGIES

(JOINT,) = STRATEGIES["joint"]
MEMORY_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample")
    parser.add_argument("--objective", default=RunConfig.objective)
    parser.add_argument("--passages", type=int, default=2, help="that go backward, of five")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dev", type=int, default=100, help="dev questions of the loss")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after each seed")
    parser.add_argument("--peak_of", type=int, help="train two steps with so many passages here, and print the peak")
    flags = parser.parse_args()
    settings = {"data": flags.data, "objective": flags.objective, "keep": "last"}
    if flags.peak_of is not None:
        print(json.dumps(peak_gb(settings, flags.peak_of)))
        return
    settings |= {"max_steps": flags.steps, "dev_limit": flags.dev}
    kinds = {"exact": 0, "drawn": flags.passages}
    own = settings | {"backward_passages": flags.passages}
    result: dict[str, Any] = read_json(flags.out) if flags.out.exists() else {"flags": own, "seeds": {}}
    if result["flags"] != own:
        raise SystemExit(f"{flags.out} was made with {result['flags']}: give --out and --work of their own")
    result |= provenance()
    for seed in flags.seeds.split(","):
        if seed not in result["seeds"]:
            result["seeds"][seed] = trained(settings | {"seed": int(seed)}, kinds, flags.work / seed)
            write_json(flags.out, result)
    if "peak_gb" not in result:
        result["peak_gb"] = {name: peak_of_a_process(sys.argv[1:], count) for name, count in kinds.items()}
    result |= compared(list(result["seeds"].values()), result["peak_gb"])
    write_json(flags.out, result)
    print(json.dumps(result["compared"], indent=2))


def trained(settings: Mapping[str, Any], kinds: Mapping[str, int], work: Path) -> dict[str, Any]:
    """Of each kind the seconds of its steps and the dev loss by step; both take a step in turn."""
    configs = {
        name: RunConfig(**settings, backward_passages=count, run_dir=str(work / name)) for name, count in kinds.items()
    }
    record = work / "step_seconds.json"
    seconds: dict[str, dict[str, float]] = read_json(record) if record.exists() else {name: {} for name in kinds}
    with contextlib.ExitStack() as stack:
        trainers = {name: started(config, stack) for name, config in configs.items()}
        for step in range(min(trainer.step for trainer in trainers.values()), settings["max_steps"]):
            for name, trainer in trainers.items():
                if trainer.step == step:  # one of them may have been killed after a later checkpoint
                    measuring = trainer.ledger.part("evaluation").seconds
                    _, spent, _ = trainer.advance()
                    seconds[name][str(step)] = spent - (trainer.ledger.part("evaluation").seconds - measuring)
            write_json(record, seconds)
            print(
                f"step {step}:", *(f"{name} {of.get(str(step), nan):.1f} s" for name, of in seconds.items()), flush=True
            )
    return {
        name: {"step_seconds": list(seconds[name].values()), "dev_nll": dev_losses(work / name / "metrics.jsonl")}
        for name in kinds
    }


def dev_losses(metrics: Path) -> dict[str, float]:
    """By step."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {str(line["step"]): line["dev_nll_per_answer"] for line in lines if "dev_nll_per_answer" in line}


def started(config: RunConfig, stack: contextlib.ExitStack) -> Trainer:
    """At its start, measured, or at its last checkpoint."""
    run = prepare(config)
    log = stack.enter_context(contextlib.closing(MetricsLog(run.files)))
    trainer = Trainer(run, JOINT, log)
    if trainer.step == 0:
        log.start_phase(JOINT.name)
        trainer.measure_start()
    return trainer


def peak_of_a_process(arguments: Sequence[str], count: int) -> float:
    command = [sys.executable, __file__, *arguments, f"--peak_of={count}"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def peak_gb(settings: Mapping[str, Any], count: int) -> float:
    """Of a process that loads, encodes or reads the corpus's vectors, and trains."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        own = {"max_steps": MEMORY_STEPS, "dev_every": 0, "run_dir": folder, "backward_passages": count}
        trainer = started(RunConfig(**settings, **own), stack)
        for _ in range(MEMORY_STEPS):
            trainer.advance()
    return peak_memory_bytes() / 1e9


def compared(seeds: Sequence[Mapping[str, Any]], peaks: Mapping[str, float]) -> dict[str, Any]:
    """Drawn against exact: ratios of time and memory, and the last dev losses with their spread over the seeds."""
    last = {name: [list(seed[name]["dev_nll"].values())[-1] for seed in seeds] for name in ("exact", "drawn")}
    changes = [drawn - exact for exact, drawn in zip(last["exact"], last["drawn"], strict=True)]
    seconds = [{name: seed[name]["step_seconds"] for name in last} for seed in seeds]
    figures = {
        "seconds_ratio": [median(of["drawn"]) / median(of["exact"]) for of in seconds],
        "seconds_ratio_of_later_half": [later_half(of["drawn"]) / later_half(of["exact"]) for of in seconds],
        "peak_ratio": peaks["drawn"] / peaks["exact"],
        "dev_nll": last,
        "dev_nll_change": mean(changes),
    }
    if len(seeds) > 1:
        figures["dev_nll_change_standard_error"] = stdev(changes) / len(changes) ** 0.5
        figures["dev_nll_deviation_of_seeds"] = stdev(last["exact"])
    return {"compared": figures}


def later_half(seconds: Sequence[float]) -> float:
    """Their sum: by then every shape has been compiled."""
    return sum(seconds[len(seconds) // 2 :])


if __name__ == "__main__":
    main()
