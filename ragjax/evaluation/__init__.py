"""Evaluation.

evaluate, evaluate_run, summarise, mean_recall                  predictions and their means    runner.py
paired_interval, mean_interval, before_after_table, cost_table,
strategy_table, search_table                                    what is printed                report.py
plot_search                                                     metric against rate            plots.py
CachedGenerations                                               answers kept by prompt         generations.py
"""

from ragjax.evaluation.generations import CachedGenerations
from ragjax.evaluation.plots import plot_search
from ragjax.evaluation.report import (
    METRICS,
    before_after_table,
    cost_table,
    mean_interval,
    paired_interval,
    search_table,
    strategy_table,
)
from ragjax.evaluation.runner import evaluate, evaluate_run, mean_recall, summarise

__all__ = [
    "CachedGenerations",
    "METRICS",
    "before_after_table",
    "cost_table",
    "evaluate",
    "evaluate_run",
    "mean_interval",
    "mean_recall",
    "paired_interval",
    "plot_search",
    "search_table",
    "strategy_table",
    "summarise",
]
