"""The matrix of a comparison: its runs in order, and what each takes over from the ones before it."""

import collections
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ragjax.config import ROWS, CompareConfig, RunConfig
from ragjax.runs import RunFolder
from ragjax.training.reuse import REUSED
from ragjax.training.strategies import STRATEGIES, Phase

# Row of the table -> (--strategy, --objective; None: the comparison's own).
_ROWS: dict[str, tuple[str, str | None]] = {row: (row, None) for row in ROWS} | {
    "rag_sequence": ("joint", "rag_sequence"),
    "rag_token": ("joint", "rag_token"),
}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A cell of the matrix: one row of the table for one pair of models and one seed."""

    row: str
    pair: str  # the two models' names, as in the names of folders
    config: RunConfig  # its flags, its folder among them

    @property
    def files(self) -> RunFolder:
        return RunFolder(Path(self.config.run_dir))

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What it trains, whatever its flags: they are checked when it runs."""
        return STRATEGIES[self.config.strategy]

    def describe(self) -> str:
        return f"{self.row} of {self.pair}, seed {self.config.seed}"

    def taking_over(self, finished: Sequence["Planned"]) -> "Planned":
        """The same cell, which takes over what finished ones of its pair and seed have trained alike: the first did it.

        A cell that has begun goes on with what it took then. Raises UserError where its folder does not tell.
        """
        if self.files.is_begun:
            recorded = self.files.record().config
            sources = {flag: getattr(recorded, flag) for flag in REUSED.values()}
        else:
            sources = {
                REUSED[phase.name]: other.config.run_dir
                for phase, other in itertools.product(self.phases if len(self.phases) > 1 else (), reversed(finished))
                if phase.name in REUSED and phase in other.phases and _are_alike(self, other)
            }
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **sources))


def _are_alike(one: Planned, other: Planned) -> bool:
    """Whether the phases that both have would end alike."""
    return (one.pair, one.config.seed) == (other.pair, other.config.seed)


def plan_cells(config: RunConfig, options: CompareConfig) -> list[Planned]:
    """The cells in the order in which they run: by pair of models, seed and row.

    config: the flags that all share; `run_dir` is the comparison's folder. What is not trained does not depend on a
    seed, so the row `none` has the first one alone.
    """
    folders = _folder_names([*options.embedders, *options.generators])
    cells = []
    for embedder, generator, seed, row in itertools.product(
        options.embedders, options.generators, options.seeds, [row for row in ROWS if row in options.strategies]
    ):
        if row == "none" and seed != options.seeds[0]:
            continue
        strategy, objective = _ROWS[row]
        own: dict[str, Any] = {"strategy": strategy, "objective": objective or config.objective}
        if not any("embedder" in phase.trains and phase.signal.reads_answers for phase in STRATEGIES[strategy]):
            own["retriever_objective"] = RunConfig.retriever_objective  # it has no embedder to move by answers
        if not any("embedder" in phase.trains for phase in STRATEGIES[strategy]):
            own["refresh_passages"] = RunConfig.refresh_passages  # nor one for passages to follow
        pair = f"{folders[embedder]}-{folders[generator]}"
        folder = RunFolder(Path(config.run_dir)).cell(pair, f"seed{seed}", row).path
        own |= {"embedder": embedder, "generator": generator, "seed": seed, "run_dir": str(folder)}
        cells.append(Planned(row, pair, dataclasses.replace(config, **own)))
    return cells


def _folder_names(models: Sequence[str]) -> dict[str, str]:
    """A short name for each model, fit for a folder; models that would share one get a part of their hash as well."""
    short = {model: re.sub(r"[^\w.]+", "-", Path(model).name).strip("-.") or "model" for model in models}
    counts = collections.Counter(short.values())
    return {
        model: name if counts[name] == 1 else f"{name}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"
        for model, name in short.items()
    }
