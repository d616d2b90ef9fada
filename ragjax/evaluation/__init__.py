"""Evaluation.

evaluate, evaluate_run, summarise                               predictions and their means    runner.py
paired_interval, mean_interval, before_after_table, cost_table  what is printed                report.py
"""

from ragjax.evaluation.report import METRICS, before_after_table, cost_table, mean_interval, paired_interval
from ragjax.evaluation.runner import evaluate, evaluate_run, summarise

__all__ = [
    "METRICS",
    "before_after_table",
    "cost_table",
    "evaluate",
    "evaluate_run",
    "mean_interval",
    "paired_interval",
    "summarise",
]
