"""What --remat costs and saves: peak memory and tokens per second of joint training, a process for each.

    python experiments/benchmarks/remat.py --data=$RAGJAX_DATA/hotpotqa --out=experiments/results/remat.hotpotqa.json

The command's own phase, all defaults but for its length; nothing is decoded, nothing measured on dev. Peak memory is
that of the process, loading and encoding included; tokens per second leave out the steps that compile.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from provenance import provenance

from ragjax.config import REMAT, RunConfig
from ragjax.costs import peak_memory_bytes
from ragjax.files import write_json
from ragjax.runs import prepare
from ragjax.training.loop import Trainer
from ragjax.training.records import MetricsLog
from ragjax.training.strategies import STRATEGIES

STEPS = 8
(JOINT,) = STRATEGIES["joint"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kind", choices=REMAT, help="measure this one here, and print it")
    flags = parser.parse_args()
    if flags.kind:
        print(json.dumps(measured(flags.kind, flags.data)))
        return
    result = {**provenance(), "steps": STEPS, "batch_size": RunConfig.batch_size, "remat": {}}
    for kind in REMAT:
        command = [sys.executable, __file__, f"--data={flags.data}", f"--kind={kind}"]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result["remat"][kind] = json.loads(printed.splitlines()[-1])
        print(kind, result["remat"][kind], flush=True)
        write_json(flags.out, result)


def measured(kind: str, data: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(data=data, remat=kind, run_dir=folder, max_steps=STEPS, keep="last", dev_every=0)
        run = prepare(config)
        with contextlib.closing(MetricsLog(run.files)) as log:
            trainer = Trainer(run, JOINT, log)
            log.start_phase(JOINT.name)
            steps = [trainer.advance() for _ in range(STEPS)]
    rates = [tokens / seconds for _, seconds, tokens in steps]
    return {
        "peak_gb": peak_memory_bytes() / 1e9,
        "loss": steps[-1][0]["loss"],
        # Each of the four shapes compiles once: the best half of the steps are those that found theirs compiled.
        "tokens_per_second": median(sorted(rates)[STEPS // 2 :]),
    }


if __name__ == "__main__":
    main()
