"""`python -m ragjax.prepare`: the command of ragjax/commands/prepare.py. Imported, it is the function `prepare`."""

import runpy
import sys

if __name__ == "__main__":
    runpy.run_module("ragjax.commands.prepare", run_name="__main__", alter_sys=True)
else:
    from ragjax.api import prepare

    # As in ragjax/train.py.
    sys.modules[__name__] = prepare  # ty: ignore[invalid-assignment]
