"""Brings any source into a data folder: a corpus that opens in a moment, questions with their positives, and where they
are from.

    python -m ragjax.prepare --source=hotpotqa --out=data/hotpotqa
    python -m ragjax.prepare --source=popqa --corpus=wikipedia --chunk=words --out=data/popqa
    python -m ragjax.prepare --source=FOLDER --out=data/mine

A folder is recognised by its files: ragjax's own, BEIR and MTEB, FlashRAG, DPR, datasets.save_to_disk, TFDS, the hub's
Parquet. OUT gets corpus/, train.jsonl, dev.jsonl, test.jsonl and provenance.json, and is then what --data takes. It
appears whole or not at all.
"""

from collections.abc import Sequence

from ragjax.commands import flags
from ragjax.config import PrepareConfig

flags.define_flags(PrepareConfig)


def main(arguments: Sequence[str]) -> None:
    from ragjax.api import prepare
    from ragjax.errors import UserError

    if arguments:
        raise UserError(f"ragjax.prepare takes flags only, not {arguments[0]!r}: see --help.")
    prepare(flags.parsed(PrepareConfig))


if __name__ == "__main__":
    flags.run_command(main, resumes=False)
