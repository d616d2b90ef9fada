"""ragjax fine-tunes retrieval-augmented generation: an embedder that finds passages, a generator that answers.

load_embedder    a sentence encoder by name or folder           pretrained.py
load_generator   a decoder-only language model                  pretrained.py
open_run         a trained run from its folder                  runs/run.py
losses           RAG-Token, RAG-Sequence, MNRL and others       losses.py
metrics          EM, F1, containment, Recall@k, hit@k, MRR      metrics.py

Commands: python -m ragjax.train, ragjax.lr_search, ragjax.evaluate, ragjax.ask, ragjax.export; each has --help.
"""

from ragjax import losses, metrics
from ragjax.pretrained import Embedder, Generator, load_embedder, load_generator
from ragjax.runs import open_run
from ragjax.version import __version__

__all__ = [
    "Embedder",
    "Generator",
    "__version__",
    "load_embedder",
    "load_generator",
    "losses",
    "metrics",
    "open_run",
]
