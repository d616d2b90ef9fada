"""The version, alone in a file that imports nothing: setup.py reads it before any dependency is installed."""

__version__ = "0.1.0"
