"""One phase of training: questions in seeded order, a step each, metrics and checkpoints along the way.

Everything that a step depends on follows from the configuration, the step's number and the last checkpoint, so a
run that was killed repeats the steps since that checkpoint and ends with the same parameters and metrics, bit for
bit. Seconds are therefore kept out of metrics.jsonl.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from optax import GradientTransformation

from ragjax.arrays import ModelVariables, Variables
from ragjax.checkpoints import Checkpoints
from ragjax.config import RunConfig
from ragjax.costs import Ledger
from ragjax.errors import DivergedError, UserError
from ragjax.parallel import agree_to_end, check_same, largest_of_all, to_host
from ragjax.pipeline import trained_collection
from ragjax.runs import Run
from ragjax.stopping import held_signals
from ragjax.training.dev import DevMeter
from ragjax.training.kept import Kept, criterion, finds_less, is_better
from ragjax.training.objectives import Objective, merge
from ragjax.training.passages import MovingPassages
from ragjax.training.records import MetricsLog
from ragjax.training.sampling import QuestionBatch, total_steps
from ragjax.training.signals import Assembled, Assembler, Models
from ragjax.training.state import TrainState, init_state, make_optimizer
from ragjax.training.step import make_train_step
from ragjax.training.strategies import Phase
from ragjax.training.watch import LossWatch, in_a_row
from ragjax.voice import progress, warn

# Shown on the progress bar, under shorter names.
_BAR = {
    "loss": "loss",
    "dev_recall_at_5": "recall",
    "dev_top_k_agreement": "agree",
    "dev_distinct_passages_per_100": "distinct",
}
# Measurements of a phase on the dev questions, where --dev_every does not say how often.
_MEASUREMENTS = 8


@dataclasses.dataclass(frozen=True)
class PhaseResult:
    """What a phase has made."""

    trained: dict[str, Variables]  # {"embedder" | "generator": {collection: parameters}} on the host
    cost: Ledger  # dev measurements stand under "evaluation"
    questions: int  # trained on, repetitions counted
    step: int  # of the state
    skipped_steps: Sequence[int] = ()  # whose loss or gradient was not finite
    passages_cut: Set[str] = frozenset()  # ids of the passages that some prompt has held shortened
    kept: Kept | None = None  # which state that is; None: the last
    step_share: float | None = None  # of the wall-clock, measurements apart: what lay inside compiled steps


def make_step(config: RunConfig, objective: Objective, steps: int) -> tuple[GradientTransformation, Callable]:
    """(the optimizer, the builder of the training step) of a phase of `steps` steps."""
    optimizer = make_optimizer(config.max_grad_norm, config.weight_decay)
    step = make_train_step(objective, optimizer, steps, config.warmup_fraction, config.loss_reduction, config.seed)
    return optimizer, step


def train_phase(run: Run, phase: Phase, stop_at: int | None = None, measure_every: int | None = None) -> PhaseResult:
    """Trains one phase to its end (or to step `stop_at`), from its last checkpoint if there is one.

    Args:
      run: the models to start from, the questions, and the folder for checkpoints, metrics and likelihoods.
      phase: what is trained.
      stop_at: steps after which it stops with a checkpoint, to be continued by another call.
      measure_every: steps between measurements on the dev questions, instead of those of --dev_every.

    Raises:
      UserError: too many steps in a row with a non-finite loss or gradient, a measurement that is not finite, or a
        checkpoint that cannot be written; the last one stays.

    SIGINT and SIGTERM are delivered at the end of the step, when its checkpoint is written (`ragjax.stopping`).
    """
    with contextlib.closing(MetricsLog(run.files)) as log:
        trainer = Trainer(run, phase, log, measure_every)
        try:
            if trainer.step == 0:
                log.start_phase(phase.name)
                trainer.measure_start()
            _advance_to(trainer, trainer.steps if stop_at is None else min(stop_at, trainer.steps), phase.name)
        except Exception:
            trainer.settle()
            raise
    return trainer.result()


def _advance_to(trainer: "Trainer", end: int, name: str) -> None:
    """Takes steps up to this one. name: of the progress bar."""
    shown: dict[str, str] = {}
    with progress(total=trainer.steps, initial=trainer.step, desc=name, unit="step") as bar:
        while trainer.step < end:
            with held_signals() as hold:  # left early only for a signal's handler, which may return
                asked = 0
                while trainer.step < end and not asked:
                    line, seconds, tokens = trainer.advance()
                    shown |= {short: f"{line[name]:.3g}" for name, short in _BAR.items() if name in line}
                    shown |= {"tokens_per_s": f"{tokens / seconds:.0f}"}
                    bar.set_postfix(shown, refresh=False)
                    bar.update()
                    asked = largest_of_all(hold.asked or 0)  # all processes end after the same step
                trainer.save()
                if asked:
                    agree_to_end()
                    hold.asked = asked


class _Made(NamedTuple):
    """A step's batch."""

    batch: QuestionBatch
    assembled: Assembled
    spent: Ledger  # charged when the step is taken, which may be never


@dataclasses.dataclass
class _Clock:
    """Seconds of training, measurements on the dev questions apart."""

    inside: float = 0.0  # from a step's start until its figures were there
    whole: float = 0.0


class Trainer:
    """A phase's moving parts: state, step number, costs."""

    def __init__(self, run: Run, phase: Phase, log: MetricsLog, measure_every: int | None = None):
        config = run.config
        self._config, self._phase, self._log = config, phase, log
        moves = config.refresh_passages and "embedder" in phase.trains
        self._passages = MovingPassages(run) if moves else None
        start, run = run.pipeline, run if self._passages is None else self._passages.run
        kept = config.keep_checkpoints
        self._checkpoints = Checkpoints(run.files.checkpoints(phase.name), kept)
        # Each checkpoint's best state stays beside it; one more, because it may be whole before its checkpoint.
        best = Checkpoints(run.files.best_checkpoints(phase.name), kept + 1)
        self._best = best if config.keep == "best" else None
        self._kept: Kept | None = None
        self._watch, self._clock = LossWatch(), _Clock()
        self._ahead: _Made | None = None
        self._assembler: Assembler = phase.signal.make_assembler(run, phase.trains)
        self._sampler = self._assembler.sampler
        self.steps = total_steps(config, len(self._sampler.train), self._sampler.batch_size)
        optimizer, train_step = make_step(config, self._assembler.objective, self.steps)
        self._train_step = run.arrangement.compile_step(train_step)
        self._measure_every = measure_every or measured_every(config, self.steps)
        self._meter = DevMeter(run, phase, self._assembler, start)
        trainable, frozen = split_trainable(run, phase)
        self.frozen = run.arrangement.place(frozen)
        state = init_state(run.arrangement.keep(trainable), phase.learning_rates(config), optimizer)
        self.ledger = Ledger()
        check_same(f"checkpoints of {run.files.path}", self._checkpoints.steps())
        if self._checkpoints.latest_step() is None:
            self._assembler.rewind(0)
        else:
            state = self._resume(state)
        if self._best is not None:
            self._best.remove_after(int(state.step))
            if self._kept is not None and self._kept.step == int(state.step):  # if a kill came before it was whole
                self._best.save(self._kept.step, {"trainable": state.trainable}, self._kept.as_dict())
        # The step donates its state, and the pipeline keeps using the untrained parameters.
        self.state: TrainState = run.arrangement.place(state, donated=True)
        self.step = int(state.step)

    def _resume(self, state: TrainState) -> TrainState:
        templates = {"trainable": state.trainable, "optimizer": state.optimizer}
        if self._passages is not None:
            templates["passages"] = self._passages.tree
        step, trees, extras = self._checkpoints.restore_newest(templates)
        if self._passages is not None:
            self._passages.restore(trees.pop("passages"), extras["passages"])
        self.ledger = Ledger(extras["cost"])
        self.passages_cut.update(extras["passages_cut"])
        self._assembler.rewind(extras["position"])
        self._log.rewind(self._phase.name, step)
        self._kept = Kept(**extras["kept"]) if extras["kept"] else None
        # A run of an older version had neither.
        self._watch = LossWatch(**extras.get("watch", {}))
        self._clock = _Clock(**extras.get("clock", {}))
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
        aged = {} if self._passages is None else self._passages.keep_up(self.step, self._embedder, self.ledger)
        made, self._ahead = self._ahead or self._make(self.step), None
        batch, assembled = made.batch, made.assembled
        self.ledger.merge(made.spent)
        started = time.perf_counter()
        self.state, metrics = self._train_step(self.state, self.frozen, assembled.batch)
        with ThreadPoolExecutor(1) as pool:
            ended_at = pool.submit(_time_when_there, metrics)  # which may be before the next batch is made
            if self._looks_ahead and self.step + 1 < self.steps:
                self._ahead = self._make(self.step + 1)
            taken = ended_at.result() - started
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._wait()  # a step leaves its line when the checkpoint before it is whole
        self.ledger.split(taken, assembled.work)
        self._clock.inside += taken
        self.step += 1
        skipped = bool(metrics.pop("skipped"))
        line = self._line(metrics, assembled) | aged
        if skipped or self._watch.is_spike(metrics["loss"]):
            line["event"] = "skipped" if skipped else "spike"
            line["question_ids"] = [question.id for question in batch.questions]
        measuring = time.perf_counter()
        if self._measure_every and (self.step % self._measure_every == 0 or self.step == self.steps):
            line |= self._measure()
        ended = time.perf_counter()
        seconds = ended - began
        self._clock.whole += measuring - began
        tokens = assembled.figures.get("generator_tokens") or sum(cost.tokens for cost in assembled.work.values())
        self._log.write(line, {"tokens_per_second": tokens / seconds})
        is_best = self._kept is not None and self._kept.step == self.step  # so that a resumed run knows it
        if skipped:  # no checkpoint: it has nothing new, and would push out a state from before all went wrong
            self._note_skipped(metrics)
        elif is_best or self.step % self._config.checkpoint_every == 0 or self.step == self.steps:
            self._save()
        self._clock.whole += time.perf_counter() - ended
        return line, seconds, tokens

    @property
    def _looks_ahead(self) -> bool:
        """Whether the next batch can be made while a step is computed: not where that moves the passages' vectors."""
        return self._assembler.looks_ahead and self._passages is None

    @property
    def _embedder(self) -> Variables:
        """The embedder's variables as they are now."""
        return merge(self.frozen, self.state.trainable)["embedder"]

    def _make(self, step: int) -> _Made:
        batch, spent = self._sampler.training_batch(step), Ledger()
        return _Made(batch, self._assembler.assemble(batch, merge(self.frozen, self.state.trainable), spent), spent)

    def measure_start(self) -> None:
        """The dev figures before the first step."""
        if figures := self._measure() if self._measure_every else {}:
            self._log.write({"phase": self._phase.name, "step": 0, **figures})

    def _measure(self) -> dict[str, float]:
        """Dev figures of the state as it is, which is kept where they are the best so far."""
        moved = {} if self._passages is None else self._passages.refresh(self.step, self._embedder, self.ledger)
        measured = self._meter.measure(self.step, self.state.trainable, self.frozen, self.ledger)
        figures = {f"dev_{name}": value for name, value in (measured.figures | moved).items()}
        # Before any checkpoint: weights that this update has spoilt must not replace a good one.
        if bad := _not_finite(figures):
            raise self._diverged(f"has a non-finite {bad}")
        chosen_by = criterion(self._phase, measured.figures)
        if self._best is None or not chosen_by:
            return figures
        if self._kept is None:
            self._kept = Kept(self.step, chosen_by, chosen_by)
        elif is_better(chosen_by, self._kept.figures) and not (
            self._phase.signal.reads_answers and finds_less(measured.found, self._meter.health)
        ):
            self._kept = dataclasses.replace(self._kept, step=self.step, figures=chosen_by)
        if self._kept.step == self.step:
            trained = {"trainable": self.state.trainable}
            self._best.save(self.step, trained, self._kept.as_dict(), in_background=True)
        return figures

    def result(self) -> PhaseResult:
        """What the phase has made so far: the best state, or the one as it is."""
        if self._best is None or self._kept is None or self._kept.step == self.step:
            step, trained = self.step, to_host(self.state.trainable)
        else:
            step, trees, _ = self._best.restore({"trainable": self.state.trainable}, self._kept.step)
            trained = trees["trainable"]
        skipped = self._watch.skipped
        share = self._clock.inside / self._clock.whole if self._clock.whole else None
        return PhaseResult(
            trained, self.ledger, self.questions_seen, step, skipped, self.passages_cut, self._kept, share
        )

    def _note_skipped(self, metrics: Mapping[str, float]) -> None:
        """Counts a step that the compiled step has skipped; too many one after another end the training."""
        self._watch.skipped.append(self.step)
        many = in_a_row(self._watch.skipped, self.step)
        fault = f"has a non-finite {_not_finite(metrics)}"
        if many >= self._config.max_nonfinite_steps:
            raise self._diverged(fault + (f" as the {many - 1} before it" if many > 1 else ""))
        warn(f"step {self.step} of {self._phase.name} {fault}, so its update is skipped.")

    def _diverged(self, fault: str) -> DivergedError:
        last = self._checkpoints.latest_step()
        kept = "no checkpoint was written yet" if last is None else f"the checkpoint of step {last} is kept"
        flags = " or ".join(f"--{model}_lr" for model in self._phase.trains)
        return DivergedError(
            f"Step {self.step} {fault}, so training stopped; {kept}: lower {flags} in a new --run_dir."
        )

    def _line(self, metrics: Mapping[str, float], assembled: Assembled) -> dict[str, Any]:
        rates = {f"{model}_lr": float(rate) * metrics["schedule"] for model, rate in self.state.learning_rates.items()}
        return {
            "phase": self._phase.name,
            "step": self.step,
            # JSON has no NaN.
            **{name: value for name, value in metrics.items() if name != "schedule" and math.isfinite(value)},
            **rates,
            **assembled.figures,
        }

    def save(self) -> None:
        """Writes the checkpoint of this step, unless it is there, and comes back when all is whole."""
        self._save()
        self._wait()

    def settle(self) -> None:
        """Waits for what is being written when something else has gone wrong, which is what will be told."""
        for checkpoints in filter(None, (self._checkpoints, self._best)):
            with contextlib.suppress(UserError):
                checkpoints.wait()

    def _wait(self) -> None:
        """For what is being written. Raises UserError where it could not be."""
        self._checkpoints.wait()
        if self._best is not None:
            self._best.wait()

    def _save(self) -> None:
        trees = {"trainable": self.state.trainable, "optimizer": self.state.optimizer}
        extras = {
            "phase": self._phase.name,
            "seed": self._config.seed,
            "cost": self.ledger.as_dict(),
            "passages_cut": sorted(self.passages_cut),
            "position": self._assembler.position,
            "questions": self.questions_seen,
            "kept": self._kept and self._kept.as_dict(),
            "watch": self._watch.as_dict(),
            "clock": dataclasses.asdict(self._clock),
        }
        if self._passages is not None:
            trees["passages"], extras["passages"] = self._passages.tree, self._passages.extras
        self._checkpoints.save(self.step, trees, extras, in_background=True)


def _time_when_there(arrays: Any) -> float:
    jax.block_until_ready(arrays)
    return time.perf_counter()


def split_trainable(models: Models, phase: Phase) -> tuple[ModelVariables, ModelVariables]:
    """(trainable, frozen), each {"embedder" | "generator": {collection: parameters}}."""
    trained = {"embedder": "params", "generator": trained_collection(models.config)}
    trainable: dict[str, Variables] = {}
    frozen: dict[str, Variables] = {}
    for name, variables in models.variables.items():
        moves = {trained[name]} if name in phase.trains else set()
        trainable[name] = {collection: tree for collection, tree in variables.items() if collection in moves}
        frozen[name] = {collection: tree for collection, tree in variables.items() if collection not in moves}
    return {name: tree for name, tree in trainable.items() if tree}, {
        name: tree for name, tree in frozen.items() if tree
    }


def _not_finite(figures: Mapping[str, float]) -> str | None:
    """The name of a figure that is not finite, the loss where it is one; None where all are."""
    bad = [name for name, value in figures.items() if not math.isfinite(value)]
    return "loss" if "loss" in bad else next(iter(bad), None)


def measured_every(config: RunConfig, steps: int) -> int:
    """Steps between measurements on the dev questions; 0: none."""
    return -(-steps // _MEASUREMENTS) if config.dev_every is None else config.dev_every
