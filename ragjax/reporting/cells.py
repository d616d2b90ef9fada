"""What a report is made from: cells, each a run of one strategy with one pair of models and one seed."""

import dataclasses
from pathlib import Path

from ragjax.runs import RunFolder

# The rows of Lawton et al. 2025, in their order and under their names.
LABELS = {
    "none": "No Ft.",
    "embedder": "Ft. Embed.",
    "generator": "Ft. Gen.",
    "independent": "Indp.",
    "two_phase": "2-Phase",
    "rag_sequence": "RAG-Seq.",
    "rag_token": "RAG-Tok.",
}
# What costs are compared with.
REFERENCE = "generator"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the comparison."""

    row: str  # of LABELS
    embedder: str  # as named on the command line: short name, hub id or path
    generator: str
    seed: int
    files: RunFolder  # of a finished run; need not be finished where `failure` says why
    failure: str = ""  # one sentence: why the cell has no result


def shown(place: str, with_places: bool) -> str:
    """A path, or the name of a model or data set; an absolute path without its folders, if they are not to be shown."""
    return Path(place).name if not with_places and Path(place).is_absolute() else place


def row_of(strategy: str, objective: str) -> str:
    """The row of a run: joint training is one by its objective, every other strategy is its own."""
    return objective if strategy == "joint" else strategy
