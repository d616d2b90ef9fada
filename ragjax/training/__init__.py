"""Training.

train        a whole run: before, phases, after, summary       run.py
STRATEGIES   strategies as tuples of phases                    strategies.py
"""

from ragjax.training.run import train
from ragjax.training.strategies import STRATEGIES

__all__ = ["STRATEGIES", "train"]
