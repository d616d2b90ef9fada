"""Turns a finished run folder into one file for experiments/results: figures and ids, no question or passage text.

python experiments/collect_run.py --run_dir=runs/demo --command="make demo" --out=experiments/results/demo.json
"""

import argparse
from pathlib import Path

from ragjax.files import read_json, read_json_lines, write_json
from ragjax.runs import RunFolder

# What identifies the run, as far as its version of ragjax has recorded it. Folders are cut to their names, because
# paths differ between machines.
_FROM_CONFIG = ("flags", "phases", "learning_rates", "inputs", "index", "versions", "devices")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--command", required=True, help="the command that made the run, as anyone can repeat it")
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    run = RunFolder(flags.run_dir)
    config = read_json(run.config_file)
    config["flags"] |= {"data": config["inputs"]["data"]["name"], "run_dir": run.path.name}
    config["flags"] |= {name: Path(config["flags"].get(name, "")).name for name in ("embedder_run", "generator_run")}
    result = {
        "command": flags.command,
        **{name: config[name] for name in _FROM_CONFIG if name in config},
        "summary": read_json(run.summary_file),
        "metrics": read_json_lines(run.metrics_file),
        "predictions": {
            path.stem: [{key: line[key] for key in ("id", "em", "f1")} for line in read_json_lines(path)]
            for path in sorted(run.predictions_folder.glob("*.jsonl"))
        },
    }
    write_json(flags.out, result)


if __name__ == "__main__":
    main()
