"""One embedder phase at several learning rates at once: stacked copies of the embedder, trained by one `vmap`ped step.

Only the question side of the embedder moves, and what it learns from (labels, or the likelihoods of a frozen generator)
does not depend on the rate: so copies that find the same passages share their likelihoods, and a whole grid costs
little more than one run of the phase.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ragjax.arrays import ModelVariables, Tree
from ragjax.costs import Cost, Ledger
from ragjax.parallel import join_copies, stack_copies
from ragjax.runs import Run
from ragjax.training.loop import make_step
from ragjax.training.sampling import QuestionBatch, total_steps
from ragjax.training.signals import StackableAssembler
from ragjax.training.state import TrainState, init_state
from ragjax.training.watch import in_a_row
from ragjax.voice import progress


@dataclasses.dataclass
class Copy:
    """One rate's outcome."""

    rate: float
    dev_losses: np.ndarray  # [n] of the dev questions, when it was last measured; [0] where there are none
    steps: int  # that it was trained
    params: Tree | None  # the embedder's; None where it was stopped early
    skipped: list[int] = dataclasses.field(default_factory=list)  # steps whose loss or gradient was not finite
    diverged: bool = False  # too many of these one after another, or a dev loss that is not finite

    @property
    def mean_loss(self) -> float:
        """Over the dev questions; infinite where it diverged."""
        return math.inf if self.diverged else float(self.dev_losses.mean())


@dataclasses.dataclass(frozen=True)
class StackedResult:
    """What a stacked phase gave."""

    start_losses: np.ndarray  # [n] of the dev questions before training
    copies: list[Copy]  # in the order of the rates
    cost: Ledger  # dev measurements stand under "evaluation"
    step_seconds: list[float]
    pairs: int  # (question, passage) pairs scored, dev questions apart


def train_stacked(run: Run, rates: Sequence[float], assembler: StackableAssembler, rungs: int = 1) -> StackedResult:
    """Trains one copy of the embedder at each rate.

    Args:
      run: the models to start from, and the flags of the phase; its own embedder_lr is not used.
      rates: peak learning rates.
      assembler: of the phase. Likelihoods that it keeps are found again by a later call.
      rungs: 1: all copies are trained to the end. Otherwise the training is cut into this number of equal parts, and
        after each but the last the half with the higher dev loss is stopped (successive halving, Jamieson and Talwalkar
        2016, arXiv 1502.07943).
    """
    return _Stack(run, rates, assembler).train(rungs)


class _Stack:
    """The copies' moving parts."""

    def __init__(self, run: Run, rates: Sequence[float], assembler: StackableAssembler):
        self._assembler = assembler
        self._steps = total_steps(run.config, len(assembler.sampler.train), assembler.sampler.batch_size)
        self._rates = list(rates)
        self._most_skipped = run.config.max_nonfinite_steps
        optimizer, make = make_step(run.config, assembler.objective, self._steps)
        self._arrangement = run.arrangement
        self._train_step = self._arrangement.compile_copies(make)
        self._losses = self._arrangement.compile_map(_question_losses(assembler.objective))
        variables = {"embedder": run.embedder.variables}
        states = [init_state(variables, {"embedder": rate}, optimizer) for rate in self._rates]
        self._state: TrainState = self._arrangement.place(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
        self._frozen = self._arrangement.place({n: tree for n, tree in run.variables.items() if n != "embedder"})
        self._ledger = Ledger()

    def train(self, rungs: int) -> StackedResult:
        every = {rate: Copy(rate, np.empty(0), 0, None) for rate in self._rates}
        start_losses, seconds = self._dev_losses()[0], []
        pairs, pairs_before = 0, self._assembler.pairs_scored
        ends = [round(self._steps * (rung + 1) / rungs) for rung in range(rungs)]
        with progress(total=self._steps, desc=f"{len(self._rates)} rates", unit="step") as bar:
            for step in range(self._steps):
                spent, skipped = self._advance(step)
                seconds.append(spent)
                bar.update()
                self._stop_diverged([every[rate] for rate in self._rates], step + 1, skipped)
                if not self._rates:
                    break
                if step + 1 not in ends:
                    continue
                pairs += self._assembler.pairs_scored - pairs_before
                for rate, losses in zip(self._rates, self._dev_losses(), strict=True):
                    every[rate].dev_losses, every[rate].steps = losses, step + 1
                    every[rate].diverged = not np.isfinite(losses).all()
                pairs_before = self._assembler.pairs_scored
                if step + 1 < self._steps:
                    best = sorted(self._rates, key=lambda rate: every[rate].mean_loss)
                    self._go_on_with(best[: -(-len(best) // 2)])
        for number, rate in enumerate(self._rates):
            every[rate].params = jax.tree.map(
                lambda leaf, number=number: np.asarray(leaf[number]), self._state.trainable["embedder"]["params"]
            )
        return StackedResult(start_losses, list(every.values()), self._ledger, seconds, pairs)

    def _stop_diverged(self, copies: Sequence[Copy], step: int, skipped: np.ndarray) -> None:
        """Stops the copies that have skipped too many steps one after another; the others continue without them."""
        for copy in [copy for copy, now in zip(copies, skipped, strict=True) if now]:
            copy.skipped.append(step)
            if in_a_row(copy.skipped, step) >= self._most_skipped:
                copy.steps, copy.diverged = step, True
        if any(copy.diverged for copy in copies):
            self._go_on_with([copy.rate for copy in copies if not copy.diverged])

    def _advance(self, step: int) -> tuple[float, np.ndarray]:
        """One step of all copies: its seconds, and whether each copy [copies] has skipped it."""
        began = time.perf_counter()
        batch, work = self._assemble(self._assembler.sampler.training_batch(step), self._ledger)
        started = time.perf_counter()
        self._state, metrics = self._train_step(self._state, {}, batch)
        skipped = jax.device_get(metrics["skipped"])
        self._ledger.split(time.perf_counter() - started, work)
        return time.perf_counter() - began, skipped

    def _assemble(self, batch: QuestionBatch, ledger: Ledger) -> tuple[Any, dict[str, Cost]]:
        """A batch [groups, copies, micro-batches, ...] and the work in it."""
        variables, count = {**self._frozen, **self._state.trainable}, len(self._rates)
        batches, work = self._assembler.assemble_stacked(batch, variables, count, ledger)
        total = Cost(0.0, work.flops * count, work.tokens * count, work.backward_tokens * count)
        return stack_copies(batches), {"embedder": total}

    def _dev_losses(self) -> np.ndarray:
        """[copies, n] of the dev questions."""
        found = [np.empty((len(self._rates), 0), np.float32)]
        began, spent, work_done = time.perf_counter(), Ledger(), Cost()
        for questions in self._assembler.sampler.dev_batches(0):
            batch, work = self._assemble(questions, spent)
            losses, valid = jax.device_get(self._losses(self._state.trainable, batch))
            # Fillers are the same for all copies.
            found.append(join_copies(losses)[:, join_copies(valid)[0]])
            work_done += work["embedder"]
        cost = dataclasses.replace(spent.total() + work_done, seconds=time.perf_counter() - began)
        self._ledger.add("evaluation", cost)
        return np.concatenate(found, axis=1)

    def _go_on_with(self, rates: Sequence[float]) -> None:
        """Drops the copies at other rates."""
        places = [number for number, rate in enumerate(self._rates) if rate in rates]
        self._rates = [self._rates[number] for number in places]
        if places:
            chosen = jnp.asarray(places)
            fewer = jax.tree.map(lambda leaf: jnp.take(leaf, chosen, axis=0), self._state)
            self._state = self._arrangement.place(fewer)


def _question_losses(objective: Callable) -> Callable:
    """(stacked trainable, [copies, micro-batches, ...]) -> (losses, valid), [copies, micro-batches, B] each."""

    def losses(trainable: ModelVariables, batch: Any):
        def of_one(trainable, batch):
            def of_micro(micro_batch):
                found = objective(trainable, {}, micro_batch, None)
                return found.loss, found.valid

            return jax.lax.map(of_micro, batch)

        return jax.vmap(of_one)(trainable, batch)

    return losses
