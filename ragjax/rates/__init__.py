"""Learning-rate search.

search_rates    every rate of each model, the winner, and search.json     search.py
train_stacked   copies of the embedder at many rates in one step          stacked.py
"""

from ragjax.rates.search import search_rates
from ragjax.rates.stacked import Copy, StackedResult, train_stacked

__all__ = ["Copy", "StackedResult", "search_rates", "train_stacked"]
