"""`python -m ragjax.evaluate`: the command of ragjax/commands/evaluate.py. Imported, it is the function `evaluate`."""

import runpy
import sys

if __name__ == "__main__":
    runpy.run_module("ragjax.commands.evaluate", run_name="__main__", alter_sys=True)
else:
    from ragjax.api import evaluate

    # What stands here is what the import system binds to the name in the package: the function, not this module.
    # The import system takes any object; its stub says modules alone.
    sys.modules[__name__] = evaluate  # ty: ignore[invalid-assignment]
