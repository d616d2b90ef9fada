"""`python -m ragjax.train`: the command of ragjax/commands/train.py. Imported, it is the function `train`."""

import runpy
import sys

if __name__ == "__main__":
    runpy.run_module("ragjax.commands.train", run_name="__main__", alter_sys=True)
else:
    from ragjax.api import train

    # What stands here is what the import system binds to the name in the package: the function, not this module.
    # The import system takes any object; its stub says modules alone.
    sys.modules[__name__] = train  # ty: ignore[invalid-assignment]
