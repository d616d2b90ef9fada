"""Fine-tunes a retrieval-augmented generation pipeline, and reports what it gained and what it cost.

    python -m ragjax.train                                    # joint training on the included sample
    python -m ragjax.train --strategy=joint --data=FOLDER --run_dir=runs/mine
    python -m ragjax.train --dry_run --devices=8xa10 --generator=llama3-8b    # whether it fits, before it is loaded
    python -m ragjax.train --coordinator_address=HOST:PORT --num_processes=2 --process_id=0 --parallelism=mesh ...

The run folder gets config.json, metrics.jsonl, TensorBoard events, checkpoints/, predictions/ (before and after
training), summary.json and report.html. The same command continues an unfinished run, and prints the table of a
finished one.
"""

from collections.abc import Sequence

from ragjax.commands import flags
from ragjax.config import DryRunConfig, ProcessConfig, RunConfig

flags.define_flags(RunConfig)
flags.define_flags(DryRunConfig)
flags.define_flags(ProcessConfig)


def main(arguments: Sequence[str]) -> None:
    from ragjax.dry_run import dry_run
    from ragjax.errors import UserError
    from ragjax.parallel import join_processes
    from ragjax.training import train

    if arguments:
        raise UserError(f"ragjax.train takes flags only, not {arguments[0]!r}: see --help.")
    config, trial, processes = flags.parsed(RunConfig), flags.parsed(DryRunConfig), flags.parsed(ProcessConfig)
    if trial.dry_run and processes.coordinator_address:
        raise UserError("--dry_run runs in one process: leave --coordinator_address out; --devices names a machine.")
    if processes.coordinator_address:
        join_processes(processes.coordinator_address, processes.num_processes, processes.process_id)
    if trial.dry_run:
        dry_run(config, trial.devices)
    else:
        train(config)


if __name__ == "__main__":
    flags.run_command(main, trains=True)
