"""The command that will bring any source into a data folder; this version has none yet."""

import sys

if __name__ == "__main__":
    sys.exit(
        "error: ragjax.prepare is not part of this version yet: write the folder's corpus, train, dev and test .jsonl "
        "files yourself, as README.md shows, and give it to --data."
    )
