"""`python -m ragjax.compare`: the command of ragjax/commands/compare.py. Imported, it is the function `compare`."""

import runpy
import sys

if __name__ == "__main__":
    runpy.run_module("ragjax.commands.compare", run_name="__main__", alter_sys=True)
else:
    from ragjax.comparison import compare

    # As in ragjax/train.py.
    sys.modules[__name__] = compare  # ty: ignore[invalid-assignment]
