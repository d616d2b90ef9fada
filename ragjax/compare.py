"""`python -m ragjax.compare`: the command of ragjax/commands/compare.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ragjax.commands.compare", run_name="__main__", alter_sys=True)
