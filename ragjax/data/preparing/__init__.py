"""Any source as a folder that opens in a moment.

prepare, Cutting           a source -> a prepared folder                      preparation.py
Matcher, RULE              which passages a question's labels are             labels.py
"""

from ragjax.data.preparing.labels import RULE, Matcher
from ragjax.data.preparing.preparation import Cutting, prepare

__all__ = ["RULE", "Cutting", "Matcher", "prepare"]
