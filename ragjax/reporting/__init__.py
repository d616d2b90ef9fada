"""Reports: finished run folders as one page, and the same as Markdown, CSV and JSON.

Cell, LABELS, row_of               what a report is made from                       cells.py
write_report, write_run_report,
Report                             the files                                        render.py
Findings, find                     every number                                     findings.py
Advice, advise                     which strategy, and how sure                     advice.py
plot_rates                         the picture of a learning-rate search            figures.py
"""

from ragjax.reporting.advice import Advice, advise
from ragjax.reporting.cells import LABELS, Cell, row_of
from ragjax.reporting.figures import plot_rates
from ragjax.reporting.findings import Findings, find
from ragjax.reporting.render import Report, write_report, write_run_report

__all__ = [
    "Advice",
    "Cell",
    "Findings",
    "LABELS",
    "Report",
    "advise",
    "find",
    "plot_rates",
    "row_of",
    "write_report",
    "write_run_report",
]
