"""Comparison: every strategy under one budget on the user's own data.

compare                what `python -m ragjax.compare` does             run.py
Execution              the runs, one after another                      execution.py
Planned, plan_cells    which runs there are, and what they share        matrix.py
Pace, measure_pace     what a run will take: time, disk, memory         estimate.py
"""

from ragjax.comparison.estimate import Pace, measure_pace
from ragjax.comparison.execution import Execution
from ragjax.comparison.matrix import Planned, plan_cells
from ragjax.comparison.run import compare

__all__ = ["Execution", "Pace", "Planned", "compare", "measure_pace", "plan_cells"]
