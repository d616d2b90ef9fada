"""Training.

train, train_run    a whole run: before, phases, after, summary       run.py
STRATEGIES          strategies as tuples of phases                    strategies.py
"""

from ragjax.training.run import train, train_run
from ragjax.training.strategies import STRATEGIES

__all__ = ["STRATEGIES", "train", "train_run"]
