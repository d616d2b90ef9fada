"""One phase of training: questions in seeded order, a step each, metrics and checkpoints along the way.

Everything that a step depends on follows from the configuration, the step's number and the last checkpoint, so a
run that was killed repeats the steps since that checkpoint and ends with the same parameters and metrics, bit for
bit. Seconds are therefore kept out of metrics.jsonl.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import numpy as np
from optax import GradientTransformation

from ragjax.checkpoints import Checkpoints
from ragjax.config import RunConfig
from ragjax.costs import Cost, Ledger
from ragjax.errors import DivergedError
from ragjax.parallel import compile_step, compile_sums, place
from ragjax.pipeline import trained_collection
from ragjax.runs import Run
from ragjax.training.health import RetrievalHealth
from ragjax.training.objectives import Objective, merge
from ragjax.training.records import MetricsLog
from ragjax.training.sampling import QuestionBatch, total_steps
from ragjax.training.signals import Assembled, Assembler, Variables
from ragjax.training.state import TrainState, init_state, make_optimizer
from ragjax.training.step import make_eval_step, make_train_step, means
from ragjax.training.strategies import Phase
from ragjax.voice import progress, warn

Tree = Mapping[str, Any]

# Shown on the progress bar, under shorter names.
_BAR = {"dev_recall_at_5": "recall", "dev_top_k_agreement": "agree", "dev_distinct_passages_per_100": "distinct"}


@dataclasses.dataclass(frozen=True)
class PhaseResult:
    """What a phase has made."""

    trained: dict[str, Tree]  # {"embedder" | "generator": {collection: parameters}} on the host
    cost: Ledger  # dev measurements stand under "evaluation"
    questions: int  # trained on, repetitions counted
    passages_cut: Set[str] = frozenset()  # ids of the passages that some prompt has held shortened


def make_step(config: RunConfig, objective: Objective, steps: int) -> tuple[GradientTransformation, Callable]:
    """(the optimizer, the builder of the training step) of a phase of `steps` steps."""
    optimizer = make_optimizer(config.max_grad_norm, config.weight_decay)
    step = make_train_step(objective, optimizer, steps, config.warmup_fraction, config.loss_reduction, config.seed)
    return optimizer, step


def train_phase(run: Run, phase: Phase, stop_at: int | None = None) -> PhaseResult:
    """Trains one phase to its end (or to step `stop_at`), from its last checkpoint if there is one.

    Args:
      run: the models to start from, the questions, and the folder for checkpoints, metrics and likelihoods.
      phase: what is trained.
      stop_at: steps after which it stops with a checkpoint, to be continued by another call.

    Raises:
      UserError: a non-finite loss or gradient, or a checkpoint that cannot be written; the last one stays.
    """
    with contextlib.closing(MetricsLog(run.files)) as log:
        trainer = Trainer(run, phase, log)
        end = trainer.steps if stop_at is None else min(stop_at, trainer.steps)
        if trainer.step == 0:
            log.start_phase(phase.name)
            trainer.measure_dev()
        shown: dict[str, str] = {}
        with progress(total=trainer.steps, initial=trainer.step, desc=phase.name, unit="step") as bar:
            while trainer.step < end:
                line, seconds, tokens = trainer.advance()
                shown |= {short: f"{line[name]:.3g}" for name, short in _BAR.items() if name in line}
                shown |= {"loss": f"{line['loss']:.3f}", "tokens_per_s": f"{tokens / seconds:.0f}"}
                bar.set_postfix(shown, refresh=False)
                bar.update()
        trainer.save()
    trained = jax.device_get(trainer.state.trainable)
    return PhaseResult(trained, trainer.ledger, trainer.questions_seen, trainer.passages_cut)


class Trainer:
    """A phase's moving parts: state, step number, costs."""

    def __init__(self, run: Run, phase: Phase, log: MetricsLog):
        config = run.config
        self._config, self._phase, self._pipeline, self._log = config, phase, run.pipeline, log
        self._checkpoints = Checkpoints(run.files.checkpoints(phase.name))
        self._assembler: Assembler = phase.signal.make_assembler(run, phase.trains)
        self._sampler = self._assembler.sampler
        self.steps = total_steps(config, len(self._sampler.train), self._sampler.batch_size)
        optimizer, train_step = make_step(config, self._assembler.objective, self.steps)
        self._train_step = compile_step(train_step)
        self._eval_step = compile_sums(make_eval_step(self._assembler.objective))
        watched = run.dataset.dev if config.dev_every and "embedder" in phase.trains else []
        self._health = RetrievalHealth(run.pipeline, watched, config.top_k)
        self._has_warned = False
        trainable, frozen = split_trainable(run, phase)
        self.frozen = place(frozen)
        state = init_state(trainable, phase.learning_rates(config), optimizer)
        self.ledger = Ledger()
        if self._checkpoints.latest_step() is None:
            self._assembler.rewind(0)
        else:
            state = self._resume(state)
        # The step donates its state, and the pipeline keeps using the untrained parameters.
        self.state: TrainState = place(state, donated=True)
        self.step = int(state.step)

    def _resume(self, state: TrainState) -> TrainState:
        step, trees, extras = self._checkpoints.restore({"trainable": state.trainable, "optimizer": state.optimizer})
        self.ledger = Ledger(extras["cost"])
        self.passages_cut.update(extras["passages_cut"])
        self._assembler.rewind(extras["position"])
        self._log.rewind(self._phase.name, step)
        return state._replace(step=jax.numpy.int32(step), **trees)

    @property
    def passages_cut(self) -> set[str]:
        """Ids of the passages that some prompt has held shortened so far."""
        return self._assembler.passages_cut

    @property
    def questions_seen(self) -> int:
        """Questions trained on so far, repetitions counted."""
        return self._sampler.questions_seen(self.step)

    def advance(self) -> tuple[dict[str, Any], float, int]:
        """One step: (its line of metrics, seconds, tokens that went through a model)."""
        began = time.perf_counter()
        assembled = self._assemble(self._sampler.training_batch(self.step), self.ledger)
        started = time.perf_counter()
        self.state, metrics = self._train_step(self.state, self.frozen, assembled.batch)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.ledger.split(time.perf_counter() - started, assembled.work)
        self.step += 1
        self._refuse_non_finite(metrics)
        line = self._line(metrics, assembled)
        if self._config.dev_every and (self.step % self._config.dev_every == 0 or self.step == self.steps):
            line |= self._dev_figures()
            # Before the checkpoint: weights that this update has spoilt must not replace a good one.
            self._refuse_non_finite({name: value for name, value in line.items() if name.startswith("dev_")})
        seconds = time.perf_counter() - began
        tokens = assembled.figures.get("generator_tokens") or sum(cost.tokens for cost in assembled.work.values())
        self._log.write(line, {"tokens_per_second": tokens / seconds})
        if self.step % self._config.checkpoint_every == 0 or self.step == self.steps:
            self.save()
        return line, seconds, tokens

    def measure_dev(self) -> None:
        """The dev figures before the first step."""
        if figures := self._dev_figures() if self._config.dev_every else {}:
            self._log.write({"phase": self._phase.name, "step": 0, **figures})

    def _assemble(self, batch: QuestionBatch, ledger: Ledger) -> Assembled:
        return self._assembler.assemble(batch, self._variables(), ledger)

    def _variables(self) -> Variables:
        """Both models as they are now."""
        return merge(self.frozen, self.state.trainable)

    def _refuse_non_finite(self, metrics: Mapping[str, float]) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            last = self._checkpoints.latest_step()
            kept = "no checkpoint was written yet" if last is None else f"the checkpoint of step {last} is kept"
            flags = " or ".join(f"--{model}_lr" for model in self._phase.trains)
            raise DivergedError(
                f"Step {self.step} has a non-finite {bad[0]}, so training stopped; {kept}: lower {flags} in a new "
                "--run_dir."
            )

    def _line(self, metrics: Mapping[str, float], assembled: Assembled) -> dict[str, Any]:
        rates = {f"{model}_lr": float(rate) * metrics["schedule"] for model, rate in self.state.learning_rates.items()}
        return {
            "phase": self._phase.name,
            "step": self.step,
            **{name: value for name, value in metrics.items() if name != "schedule"},
            **rates,
            **assembled.figures,
        }

    def _dev_figures(self) -> dict[str, float]:
        """Mean loss over the dev questions with the models as they are now, and the health of a moving embedder."""
        total = None
        for batch in self._sampler.dev_batches(self.step):
            began, spent = time.perf_counter(), Ledger()
            assembled = self._assemble(batch, spent)
            sums = jax.device_get(self._eval_step(self.state.trainable, self.frozen, assembled.batch))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
            work = spent.total() + sum(assembled.work.values(), Cost())
            self.ledger.add("evaluation", dataclasses.replace(work, seconds=time.perf_counter() - began))
        counts = ("questions", "answer_tokens")
        figures = {} if total is None else {name: float(v) for name, v in means(total).items() if name not in counts}
        began = time.perf_counter()
        health = self._health.figures(self._variables()["embedder"])
        self.ledger.add("evaluation", Cost(time.perf_counter() - began))
        if self._health.has_collapsed(health) and not self._has_warned:
            self._has_warned = True
            found = ", ".join(f"{name} {value:.3g}" for name, value in health.items())
            warn(f"retrieval is collapsing at step {self.step} ({found}): lower --embedder_lr in a new run")
        return {f"dev_{name}": value for name, value in {**figures, **health}.items()}

    def save(self) -> None:
        """Writes the checkpoint of this step, unless it is there."""
        trees = {"trainable": self.state.trainable, "optimizer": self.state.optimizer}
        extras = {
            "phase": self._phase.name,
            "seed": self._config.seed,
            "cost": self.ledger.as_dict(),
            "passages_cut": sorted(self.passages_cut),
            "position": self._assembler.position,
            "questions": self.questions_seen,
        }
        self._checkpoints.save(self.step, trees, extras)


def split_trainable(run: Run, phase: Phase) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """(trainable, frozen), each {"embedder" | "generator": {collection: parameters}}."""
    trained = {"embedder": "params", "generator": trained_collection(run.config)}
    trainable: dict[str, Tree] = {}
    frozen: dict[str, Tree] = {}
    for name in trained:
        variables = getattr(run, name).variables
        moves = {trained[name]} if name in phase.trains else set()
        trainable[name] = {collection: tree for collection, tree in variables.items() if collection in moves}
        frozen[name] = {collection: tree for collection, tree in variables.items() if collection not in moves}
    return {name: tree for name, tree in trainable.items() if tree}, {
        name: tree for name, tree in frozen.items() if tree
    }
