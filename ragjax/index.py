"""`python -m ragjax.index`: the command of ragjax/commands/index.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ragjax.commands.index", run_name="__main__", alter_sys=True)
