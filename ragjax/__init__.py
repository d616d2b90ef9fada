"""ragjax fine-tunes retrieval-augmented generation: an embedder that finds passages, a generator that answers.

RunConfig          everything that decides a run's result                      config/
CompareConfig      what a comparison runs                                      config/
EvaluateConfig     what is evaluated, on which questions                       config/
PrepareConfig      what is brought into a data folder                          config/
SearchConfig       what a learning-rate search tries                           config/
prepare            a source of data, by name or folder -> a data folder        api.py
train              a configuration -> a trained Run                            api.py
evaluate           a Run, or its folder -> scores and predictions              api.py
search_rates       the learning rates of a strategy                            rates/search.py
compare            every strategy on one's own data, and a report              comparison/
open_run           a trained run from its folder                               runs/run.py
Run, Answer        what train and open_run give; what Run.ask gives            runs/
load_embedder      a sentence encoder by name or folder -> Embedder            pretrained.py
load_generator     a decoder-only language model -> Generator                  pretrained.py
losses             RAG-Token, RAG-Sequence, MNRL and others                    losses.py
metrics            EM, F1, containment, Recall@k, hit@k, MRR                   metrics.py

Each is imported when it is first used: `import ragjax` loads neither JAX nor a model's code.
Commands: python -m ragjax.prepare, ragjax.train, ragjax.compare, ragjax.lr_search, ragjax.evaluate, ragjax.ask,
ragjax.export; each has --help.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ragjax.version import __version__ as __version__

if TYPE_CHECKING:
    from ragjax import losses as losses
    from ragjax import metrics as metrics
    from ragjax.api import evaluate as evaluate
    from ragjax.api import prepare as prepare
    from ragjax.api import train as train
    from ragjax.comparison import compare as compare
    from ragjax.config import CompareConfig as CompareConfig
    from ragjax.config import EvaluateConfig as EvaluateConfig
    from ragjax.config import PrepareConfig as PrepareConfig
    from ragjax.config import RunConfig as RunConfig
    from ragjax.config import SearchConfig as SearchConfig
    from ragjax.pretrained import Embedder as Embedder
    from ragjax.pretrained import Generator as Generator
    from ragjax.pretrained import load_embedder as load_embedder
    from ragjax.pretrained import load_generator as load_generator
    from ragjax.rates import search_rates as search_rates
    from ragjax.runs import Answer as Answer
    from ragjax.runs import Run as Run
    from ragjax.runs import open_run as open_run

_NAMES = {
    "api": ("evaluate", "prepare", "train"),
    "comparison": ("compare",),
    "config": ("CompareConfig", "EvaluateConfig", "PrepareConfig", "RunConfig", "SearchConfig"),
    "pretrained": ("Embedder", "Generator", "load_embedder", "load_generator"),
    "rates": ("search_rates",),
    "runs": ("Answer", "Run", "open_run"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = ("losses", "metrics")

__all__ = sorted([*_HOMES, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    """A public name at its first use, which keeps it here."""
    if name in _MODULES:
        return importlib.import_module(f"ragjax.{name}")
    if name in _HOMES:
        value = globals()[name] = getattr(importlib.import_module(f"ragjax.{_HOMES[name]}"), name)
        return value
    raise AttributeError(f"module 'ragjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
