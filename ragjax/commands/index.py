"""Makes an index of a data set's passages, which training, evaluation and ask then share.

    python -m ragjax.index --data=FOLDER --index_dir=indexes/mine
    python -m ragjax.index --data=FOLDER --index_dir=indexes/mine --index=IVF4096,Flat --nprobe=32
    python -m ragjax.index --data=FOLDER --index_dir=indexes/mine --dry_run     # what it takes

Says first which disk, memory and time it takes, and stops where they are not there. The same command continues an
unfinished index, and prints what a finished one is. --index_dir then names it to ragjax.train, lr_search, compare,
evaluate and ask.
"""

from collections.abc import Sequence

from ragjax.commands import flags
from ragjax.config import IndexConfig

flags.define_flags(IndexConfig)


def main(arguments: Sequence[str]) -> None:
    from ragjax.errors import UserError
    from ragjax.indexing import make_index

    if arguments:
        raise UserError(f"ragjax.index takes flags only, not {arguments[0]!r}: see --help.")
    make_index(flags.parsed(IndexConfig))


if __name__ == "__main__":
    flags.run_command(main)
