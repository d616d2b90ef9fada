"""Any source as a folder that opens in a moment.

prepare, Cutting           a source -> a prepared folder                      preparation.py
Matcher, RULE              which passages a question's labels are             labels.py
open_prepared, is_prepared what stands in a prepared folder                   prepared.py
"""

from ragjax.data.preparing.labels import RULE, Matcher
from ragjax.data.preparing.preparation import Cutting, prepare
from ragjax.data.preparing.prepared import Prepared, is_prepared, open_prepared

__all__ = ["RULE", "Cutting", "Matcher", "Prepared", "is_prepared", "open_prepared", "prepare"]
