"""Decoding answers.

greedy_decode  the likeliest token each step, with a key-value cache   decode.py
"""

from ragjax.generation.decode import greedy_decode

__all__ = ["greedy_decode"]
