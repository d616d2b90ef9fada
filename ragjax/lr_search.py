"""`python -m ragjax.lr_search`: the command of ragjax/commands/lr_search.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ragjax.commands.lr_search", run_name="__main__", alter_sys=True)
