"""Any source as a folder that opens in a moment.

prepare, Cutting           a source -> a prepared folder                      preparation.py
summary_of, lost_labels    what its provenance says, in words
Matcher, RULE              which passages a question's labels are             labels.py
"""

from ragjax.data.preparing.labels import RULE, Matcher
from ragjax.data.preparing.preparation import Cutting, lost_labels, prepare, summary_of, without_passages

__all__ = ["RULE", "Cutting", "Matcher", "lost_labels", "prepare", "summary_of", "without_passages"]
