"""Runs: their folders, opening them, asking them.

RunFolder        what a run folder holds, under which names; its lock; its flags and inputs    folder.py
read_phases      the checkpoints of a run                                                     folder.py
Summary          what summary.json holds                                                      summary.py
Run, prepare     configuration, folder, data and pipeline together; loading them              run.py
open_run         a trained run from its folder                                                run.py
Answer, ask      an answer, and the passages that it rests on                                 asking.py
"""

from ragjax.runs.asking import Answer, ask
from ragjax.runs.folder import RunFolder, RunRecord, TrainedPhase, read_phases
from ragjax.runs.run import INPUTS, Run, open_run, prepare
from ragjax.runs.summary import Summary

__all__ = [
    "INPUTS",
    "Answer",
    "Run",
    "RunFolder",
    "RunRecord",
    "Summary",
    "TrainedPhase",
    "ask",
    "open_run",
    "prepare",
    "read_phases",
]
