"""Making an index that several runs share: `ragjax.index`.

make_index             a whole index, or what is missing of it    make.py
Needs, measure_needs   disk, memory and time beforehand           needs.py
measure_recall         what it finds of what there is             recall.py
"""

from ragjax.indexing.make import make_index

__all__ = ["make_index"]
