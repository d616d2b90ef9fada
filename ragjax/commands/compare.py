"""Runs every strategy under one budget on your own data, and reports which one to use and what each costs.

    python -m ragjax.compare --data=FOLDER --run_dir=runs/compare --dry_run     # what it would take
    python -m ragjax.compare --data=FOLDER --run_dir=runs/compare
    python -m ragjax.compare --data=FOLDER --strategies=none,generator,two_phase --seeds=0,1 --embedders=minilm,mpnet

Rows share what they can (models, index, answers before, a generator that is tuned alike), and each is charged what it
would have cost alone. The folder gets cells/ with a run folder for each cell, and report.html, .md, .csv and .json. The
same command continues an unfinished comparison, and prints the result of a finished one.
"""

from collections.abc import Sequence

from ragjax.commands import flags
from ragjax.config import CompareConfig, RunConfig

# What the matrix decides.
_DECIDED = ("strategy", "embedder", "generator", "seed", "embedder_run", "generator_run")

flags.define_flags(RunConfig, but=_DECIDED)
flags.define_flags(CompareConfig)


def main(arguments: Sequence[str]) -> None:
    from ragjax.comparison import compare
    from ragjax.errors import UserError

    if arguments:
        raise UserError(f"ragjax.compare takes flags only, not {arguments[0]!r}: see --help.")
    compare(flags.parsed(RunConfig, but=_DECIDED), flags.parsed(CompareConfig))


if __name__ == "__main__":
    flags.run_command(main, trains=True)
