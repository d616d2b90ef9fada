"""Evaluation.

evaluate, check_questions, copy_predictions,
Measurement, summarise, mean_recall              predictions, their cost and means      predictions.py
evaluate_runs, Evaluation, print_evaluation      several decoders, pairs of runs        runs.py
mean_interval, seeds_interval,
paired_interval, paired_p_value                  how sure a mean or a difference is     statistics.py
before_after_table, cost_table, comparison_table,
strategy_table, rates_table                      what is printed                        report.py
CachedGenerations                                answers kept by prompt                 generations.py
"""

from ragjax.evaluation.generations import CachedGenerations
from ragjax.evaluation.predictions import (
    Measurement,
    check_questions,
    copy_predictions,
    evaluate,
    mean_recall,
    summarise,
)
from ragjax.evaluation.report import (
    METRICS,
    before_after_table,
    comparison_table,
    cost_table,
    rates_table,
    strategy_table,
)
from ragjax.evaluation.runs import Evaluation, evaluate_runs, print_evaluation
from ragjax.evaluation.statistics import mean_interval, paired_interval, paired_p_value, seeds_interval

__all__ = [
    "CachedGenerations",
    "Evaluation",
    "METRICS",
    "Measurement",
    "before_after_table",
    "check_questions",
    "comparison_table",
    "copy_predictions",
    "cost_table",
    "evaluate",
    "evaluate_runs",
    "mean_interval",
    "mean_recall",
    "paired_interval",
    "paired_p_value",
    "print_evaluation",
    "rates_table",
    "seeds_interval",
    "strategy_table",
    "summarise",
]
