"""The command that will run every strategy and report on them; this version has none yet."""

import sys

if __name__ == "__main__":
    sys.exit(
        "error: ragjax.compare is not part of this version yet: run ragjax.train once for each --strategy, and compare "
        "two runs with ragjax.evaluate --run_dir=FOLDER --paired_with=FOLDER."
    )
