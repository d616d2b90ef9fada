"""The command that will make an index for several runs to share; this version has none yet."""

import sys

if __name__ == "__main__":
    sys.exit(
        "error: ragjax.index is not part of this version yet: ragjax.train makes the index of its --data by itself and "
        "keeps the vectors for the next run."
    )
