"""`python -m ragjax.prepare`: the command of ragjax/commands/prepare.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ragjax.commands.prepare", run_name="__main__", alter_sys=True)
