"""How full the rows are that the generator reads in training: the compiled shapes, and the share of real tokens.

    python experiments/benchmarks/packing.py --data=$RAGJAX_DATA/popqa --out=experiments/results/packing.popqa.json

Batches of a joint phase's first steps, all defaults, as they are before anything is trained; nothing is computed but
the questions' vectors.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from provenance import provenance

from ragjax.config import RunConfig
from ragjax.costs import Ledger
from ragjax.files import write_json
from ragjax.runs import prepare
from ragjax.training.strategies import STRATEGIES

(JOINT,) = STRATEGIES["joint"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample")
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--batch_size", type=int, default=RunConfig.batch_size)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(RunConfig(data=flags.data, run_dir=folder, max_steps=flags.steps, batch_size=flags.batch_size))
        assembler = JOINT.signal.make_assembler(run, JOINT.trains)
        used, real, padded = Counter[str](), 0, 0
        for step in range(1, flags.steps):  # the first has the largest shape, whatever it holds
            made = assembler.assemble(assembler.sampler.training_batch(step), run.variables, Ledger())
            rows = made.batch.rows
            used[
                "{1} x {2} x {3} tokens, answers of {0}".format(rows.answer_tokens.shape[-1], *rows.tokens.shape[1:])
            ] += 1
            real, padded = real + int((rows.segment_ids > 0).sum()), padded + rows.tokens.size
    result = {
        **provenance(),
        "data": {"name": run.dataset.name, "sha256": run.dataset.sha256},
        "batch_size": flags.batch_size,
        "steps by micro-batches x rows x length": dict(used.most_common()),
        "real tokens": real,
        "share of real tokens": real / padded,
    }
    write_json(flags.out, result)
    print(result)


if __name__ == "__main__":
    main()
