"""Measurements on the dev questions during a phase: the loss, and what a moving embedder finds."""

import dataclasses
import time

import jax
import numpy as np

from ragjax.arrays import ModelVariables
from ragjax.costs import Cost, Ledger
from ragjax.pipeline import Pipeline
from ragjax.runs import Run
from ragjax.training.health import Found, RetrievalHealth
from ragjax.training.objectives import merge
from ragjax.training.signals import Assembler
from ragjax.training.step import make_eval_step, means
from ragjax.training.strategies import Phase
from ragjax.voice import warn

_COUNTS = ("questions", "answer_tokens")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one state."""

    figures: dict[str, float]
    found: Found


class DevMeter:
    """Measures the states of a phase; what that costs stands under "evaluation"."""

    def __init__(self, run: Run, phase: Phase, assembler: Assembler, start: Pipeline):
        """start: what the phase begins with."""
        self._assembler = assembler
        self._eval_step = run.arrangement.compile_sums(make_eval_step(assembler.objective))
        watched = run.dataset.dev if "embedder" in phase.trains else []
        self.health = RetrievalHealth(run.pipeline, watched, run.config.top_k, start)
        self._has_warned = False

    def measure(self, step: int, trainable: ModelVariables, frozen: ModelVariables, ledger: Ledger) -> Measured:
        """The state after `step` steps: mean loss over the dev questions, and the retrieval's figures."""
        variables = merge(frozen, trainable)
        total = None
        for batch in self._assembler.sampler.dev_batches(step):
            began, spent = time.perf_counter(), Ledger()
            assembled = self._assembler.assemble(batch, variables, spent)
            sums = jax.device_get(self._eval_step(trainable, frozen, assembled.batch))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
            work = spent.total() + sum(assembled.work.values(), Cost())
            ledger.add("evaluation", dataclasses.replace(work, seconds=time.perf_counter() - began))
        figures = {} if total is None else {name: float(v) for name, v in means(total).items() if name not in _COUNTS}
        began = time.perf_counter()
        found = self.health.measure(variables["embedder"])
        ledger.add("evaluation", Cost(time.perf_counter() - began))
        self._warn_of_collapse(step, found)
        return Measured({**figures, **found.figures}, found)

    def _warn_of_collapse(self, step: int, found: Found) -> None:
        if self._has_warned or not self.health.has_collapsed(found.figures):
            return
        self._has_warned = True
        words = ", ".join(f"{name} {value:.3g}" for name, value in found.figures.items())
        warn(f"retrieval is collapsing at step {step} ({words}): lower --embedder_lr in a new run")
