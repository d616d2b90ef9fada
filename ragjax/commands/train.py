"""Fine-tunes a retrieval-augmented generation pipeline, and reports what it gained and what it cost.

    python -m ragjax.train                                    # joint training on the included sample
    python -m ragjax.train --strategy=joint --data=FOLDER --run_dir=runs/mine
    python -m ragjax.train --dry_run --devices=8xa10 --generator=llama3-8b    # whether it fits, before it is loaded

The run folder gets config.json, metrics.jsonl, TensorBoard events, checkpoints/, predictions/ (before and after
training), summary.json and report.html. The same command continues an unfinished run, and prints the table of a
finished one.
"""

from collections.abc import Sequence

from ragjax.commands import flags
from ragjax.config import DryRunConfig, RunConfig

flags.define_flags(RunConfig)
flags.define_flags(DryRunConfig)


def main(arguments: Sequence[str]) -> None:
    from ragjax.dry_run import dry_run
    from ragjax.errors import UserError
    from ragjax.training import train

    if arguments:
        raise UserError(f"ragjax.train takes flags only, not {arguments[0]!r}: see --help.")
    config, trial = flags.parsed(RunConfig), flags.parsed(DryRunConfig)
    if trial.dry_run:
        dry_run(config, trial.devices)
    else:
        train(config)


if __name__ == "__main__":
    flags.run_command(main, trains=True)
