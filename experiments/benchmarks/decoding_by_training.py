"""What decoding suits what training: each run's test answers under concat, rag_token and rag_sequence decoding.

    python experiments/benchmarks/decoding_by_training.py --runs RUN_A RUN_B --eval_limit=100 --out=table.json

RUN: folders of ragjax.train. Within a run the passages are the same for every decoder, so the differences from concat
decoding are paired by question. `ragjax.evaluate` keeps what is decoded, so the script goes on where it stopped.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from provenance import provenance

from ragjax.config import DECODERS, EvaluateConfig, RunConfig
from ragjax.evaluation import evaluate_runs
from ragjax.evaluation.statistics import paired_interval, paired_p_value
from ragjax.fields import differing_fields, flag_text
from ragjax.files import read_json, read_json_lines, write_json
from ragjax.runs import RunFolder

# Passages are the same under every decoder: only the answers differ.
METRICS = ("em", "f1", "contains")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--eval_limit", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    runs: dict[str, Any] = {}
    for run in flags.runs:
        result = evaluate_runs(EvaluateConfig(run_dir=run, decode=",".join(DECODERS), eval_limit=flags.eval_limit), {})
        trained = read_json(RunFolder(Path(run)).config_file)
        runs[Path(run).name] = {
            "command": training_command(Path(run).name, trained),
            "inputs": trained["inputs"],
            "step": result["step"],
            "n": result["n"],
            "decoders": compared(result["results"]),
        }
        write_json(
            flags.out,
            {
                **provenance(),
                "runs": runs,
            },
        )


def training_command(run: str, trained: dict[str, Any]) -> str:
    """The command that made a run, from its config.json. Folders by name alone: their places differ."""
    flags = trained["flags"] | {"data": trained["inputs"]["data"]["name"], "run_dir": f"runs/{run}"}
    chosen = RunConfig(**flags)
    changed = differing_fields(dataclasses.asdict(RunConfig()), chosen)
    return " ".join(["python -m ragjax.train", *(f"--{name}={flag_text(getattr(chosen, name))}" for name in changed)])


def compared(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Each decoder's scores, tokens read, and differences from the first decoder: {metric: [mean, low, high, p]}."""
    columns = [read_json_lines(each["predictions"]) for each in results]
    table = {}
    for each, records in zip(results, columns, strict=True):
        row = {"scores": each["scores"], "tokens": each["cost"]["tokens"], "passages_cut": each["passages_cut"]}
        if records is not columns[0]:
            row["minus_concat"] = {}
            for metric in METRICS:
                pair = [[record[metric] for record in side] for side in (columns[0], records)]
                row["minus_concat"][metric] = [*paired_interval(*pair), paired_p_value(*pair)]
        table[each["decode"]] = row
    return table


if __name__ == "__main__":
    main()
