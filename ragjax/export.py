"""`python -m ragjax.export`: the command of ragjax/commands/export.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ragjax.commands.export", run_name="__main__", alter_sys=True)
