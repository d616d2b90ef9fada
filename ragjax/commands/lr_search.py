"""Searches the learning rates of a strategy on the dev questions.

    python -m ragjax.lr_search --strategy=two_phase --data=FOLDER
    python -m ragjax.lr_search --strategy=two_phase --halving --embedder_rates=1e-7,1e-6,1e-5 --generator_lr=2e-4

The generator's rates are trained one after another, the embedder's all at once. A rate that --embedder_lr or
--generator_lr gives is not searched, nor that of a model which --embedder_run or --generator_run takes over. The run
folder gets search.json and search.png. The same command continues an unfinished search, and prints the table of a
finished one.
"""

from collections.abc import Sequence

from ragjax.commands import flags
from ragjax.config import RunConfig, SearchConfig

flags.define_flags(RunConfig)
flags.define_flags(SearchConfig)
# Enough that the dev loss tells rates apart.
flags.FLAGS.set_default("dev_limit", 100)


def main(arguments: Sequence[str]) -> None:
    from ragjax.errors import UserError
    from ragjax.rates import search_rates

    if arguments:
        raise UserError(f"ragjax.lr_search takes flags only, not {arguments[0]!r}: see --help.")
    search_rates(flags.parsed(RunConfig), flags.parsed(SearchConfig))


if __name__ == "__main__":
    flags.run_command(main, trains=True)
