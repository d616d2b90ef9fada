"""`python -m ragjax.ask`: the command of ragjax/commands/ask.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("ragjax.commands.ask", run_name="__main__", alter_sys=True)
