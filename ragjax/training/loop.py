"""One phase of training: questions in seeded order, a step each, metrics and checkpoints along the way.

Everything that a step depends on follows from the configuration, the step's number and the last checkpoint, so a
run that was killed repeats the steps since that checkpoint and ends with the same parameters and metrics, bit for
bit. Seconds are therefore kept out of metrics.jsonl.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ragjax.checkpoints import Checkpoints
from ragjax.config import RunConfig
from ragjax.costs import Cost, Ledger, forward_flops, train_flops
from ragjax.data.questions import Question
from ragjax.data.sources import Dataset
from ragjax.errors import UserError
from ragjax.parallel import pmap_step, pmap_sums, replicate
from ragjax.pipeline import Pipeline, trained_collection
from ragjax.training.assembly import Assembled, Assembler
from ragjax.training.records import MetricsLog
from ragjax.training.state import TrainState, init_state, make_optimizer
from ragjax.training.step import Objective, make_eval_step, make_train_step, means
from ragjax.training.strategies import Phase

Tree = Mapping[str, Any]


def question_order(count: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Questions of step `step` (from 0): every epoch is a seeded permutation, its last batch may be short."""
    steps_per_epoch = math.ceil(count / batch_size)
    epoch, place = divmod(step, steps_per_epoch)
    permutation = np.random.default_rng((seed, epoch)).permutation(count)
    return permutation[place * batch_size : (place + 1) * batch_size]


def total_steps(config: RunConfig, questions: int) -> int:
    return config.max_steps or config.epochs * math.ceil(questions / config.batch_size)


def train_phase(
    config: RunConfig,
    phase: Phase,
    pipeline: Pipeline,
    dataset: Dataset,
    checkpoints: Checkpoints,
    log: MetricsLog,
) -> tuple[dict[str, Tree], Ledger]:
    """Trains one phase to its end, from its last checkpoint if there is one.

    Returns:
      The trained collections on the host, and the phase's costs (dev measurements under "evaluation").

    Raises:
      UserError: a non-finite loss or gradient, or a checkpoint that cannot be written; the last one stays.
    """
    trainer = _Trainer(config, phase, pipeline, dataset, checkpoints, log)
    if trainer.step == 0:
        log.start_phase(phase.name)
        trainer.measure_dev()
    progress = tqdm(total=trainer.steps, initial=trainer.step, desc=phase.name, unit="step", dynamic_ncols=True)
    with progress:
        while trainer.step < trainer.steps:
            line, seconds, tokens = trainer.advance()
            progress.set_postfix(loss=f"{line['loss']:.3f}", tokens_per_s=f"{tokens / seconds:.0f}", refresh=False)
            progress.update()
    return jax.device_get(trainer.state.trainable), trainer.ledger


class _Trainer:
    """The phase's moving parts: state, step number, costs."""

    def __init__(
        self,
        config: RunConfig,
        phase: Phase,
        pipeline: Pipeline,
        dataset: Dataset,
        checkpoints: Checkpoints,
        log: MetricsLog,
    ):
        self._config, self._phase, self._pipeline = config, phase, pipeline
        self._questions, self._dev = (
            dataset.train,
            dataset.dev[: config.dev_limit] if config.dev_every else [],
        )
        self._checkpoints, self._log = checkpoints, log
        self.steps = total_steps(config, len(self._questions))
        self._assembler = Assembler(config, pipeline, [*self._questions, *self._dev], jax.local_device_count())
        objective = Objective(
            pipeline.embedder.module,
            pipeline.generator.module,
            config.objective,
            config.score_scale,
            dropout=config.lora_dropout > 0,
        )
        optimizer = make_optimizer(config.max_grad_norm, config.weight_decay)
        self._train_step = pmap_step(
            make_train_step(
                objective, optimizer, self.steps, config.warmup_fraction, config.loss_reduction, config.seed
            )
        )
        self._eval_step = pmap_sums(make_eval_step(objective))
        trainable, frozen = split_trainable(config, phase, pipeline)
        self._frozen = replicate(frozen)
        rates = {"embedder": config.embedder_lr, "generator": config.generator_lr}
        state = init_state(trainable, rates, optimizer)
        self.ledger = Ledger()
        if checkpoints.latest_step() is not None:
            state = self._resume(state)
        # Copied: the step donates its state, and the pipeline keeps using the untrained parameters.
        self.state: TrainState = jax.tree.map(jax.numpy.copy, replicate(state))
        self.step = int(state.step)

    def _resume(self, state: TrainState) -> TrainState:
        step, trees, extras = self._checkpoints.restore({"trainable": state.trainable, "optimizer": state.optimizer})
        self.ledger = Ledger(extras["cost"])
        self._pipeline.prompts.passages_cut.update(extras["passages_cut"])
        self._log.rewind(self._phase.name, step)
        return state._replace(step=jax.numpy.int32(step), **trees)

    def advance(self) -> tuple[dict[str, Any], float, int]:
        """One step: (its line of metrics, seconds, generator tokens)."""
        began = time.perf_counter()
        indices = question_order(len(self._questions), self._config.batch_size, self.step, self._config.seed)
        assembled = self._retrieve_and_assemble([self._questions[i] for i in indices], indices, self.ledger)
        started = time.perf_counter()
        self.state, metrics = self._train_step(self.state, self._frozen, assembled.batch)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._charge_step(assembled, time.perf_counter() - started)
        self.step += 1
        self._refuse_non_finite(metrics)
        line = self._line(metrics, assembled)
        if self._dev and (self.step % self._config.dev_every == 0 or self.step == self.steps):
            line |= self._dev_figures()
            # Before the checkpoint: weights that this update has spoilt must not replace a good one.
            self._refuse_non_finite({name: value for name, value in line.items() if name.startswith("dev_")})
        seconds, tokens = time.perf_counter() - began, sum(assembled.row_lengths)
        self._log.write(line, {"tokens_per_second": tokens / seconds})
        if self.step % self._config.checkpoint_every == 0 or self.step == self.steps:
            self._save()
        return line, seconds, tokens

    def measure_dev(self) -> None:
        """The dev loss before the first step."""
        if self._dev:
            self._log.write({"phase": self._phase.name, "step": 0, **self._dev_figures()})

    def _retrieve_and_assemble(
        self, questions: Sequence[Question], indices: Sequence[int], ledger: Ledger
    ) -> Assembled:
        embedder, config = self._pipeline.embedder, self._config
        live = self._phase.live_retrieval
        variables = self.state.trainable["embedder"] if live else embedder.variables
        began = time.perf_counter()
        vectors = self._assembler.question_vectors(questions, variables)
        embedded = time.perf_counter()
        rows, _ = self._pipeline.index.search(vectors, config.top_k)
        searched = time.perf_counter()
        assembled = self._assembler.assemble(questions, indices, rows)
        lengths = assembled.question_lengths
        ledger.add("embedder", Cost(embedded - began, forward_flops(embedder.size, lengths, 0), sum(lengths)))
        products = 2.0 * len(questions) * len(self._pipeline.store) * embedder.config.hidden_size
        ledger.add("search", Cost(searched - embedded, products, 0))
        return assembled

    def _charge_step(self, assembled: Assembled, seconds: float) -> None:
        """The compiled step holds both models: its seconds are shared out by their FLOPs."""
        embedder, generator = self._pipeline.embedder.size, self._pipeline.generator.size
        head = assembled.answer_tokens * len(assembled.row_lengths) // len(assembled.question_lengths)
        flops = {"generator": train_flops(generator, assembled.row_lengths, head)}
        if self._config.objective != "concat_nll":
            count = train_flops if "embedder" in self._phase.trains else forward_flops
            flops["embedder"] = count(embedder, assembled.question_lengths, 0)
        tokens = {"generator": sum(assembled.row_lengths), "embedder": sum(assembled.question_lengths)}
        self.ledger.split(seconds, flops, tokens)

    def _refuse_non_finite(self, metrics: Mapping[str, float]) -> None:
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            last = self._checkpoints.latest_step()
            kept = "no checkpoint was written yet" if last is None else f"the checkpoint of step {last} is kept"
            raise UserError(
                f"Step {self.step} has a non-finite {bad[0]}, so training stopped; {kept}: lower --generator_lr or "
                "--embedder_lr in a new --run_dir."
            )

    def _line(self, metrics: Mapping[str, float], assembled: Assembled) -> dict[str, Any]:
        rates = {f"{model}_lr": float(rate) * metrics["schedule"] for model, rate in self.state.learning_rates.items()}
        return {
            "phase": self._phase.name,
            "step": self.step,
            **{name: value for name, value in metrics.items() if name != "schedule"},
            **rates,
            "generator_tokens": sum(assembled.row_lengths),
            "distinct_passages": len(np.unique(assembled.passage_rows)),
        }

    def _dev_figures(self) -> dict[str, float]:
        """Mean loss over the dev questions with the embedder and generator as they are now."""
        size, total = self._config.batch_size, None
        for start in range(0, len(self._dev), size):
            questions = self._dev[start : start + size]
            began = time.perf_counter()
            indices = range(start, start + len(questions))
            assembled = self._retrieve_and_assemble(questions, indices, Ledger())
            sums = jax.device_get(self._eval_step(self.state.trainable, self._frozen, assembled.batch))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
            flops = forward_flops(self._pipeline.generator.size, assembled.row_lengths, assembled.answer_tokens)
            self.ledger.add("evaluation", Cost(time.perf_counter() - began, flops, sum(assembled.row_lengths)))
        figures = means(total)
        return {f"dev_{name}": float(figures[name]) for name in ("nll_per_answer", "nll_per_token")}

    def _save(self) -> None:
        trees = {"trainable": self.state.trainable, "optimizer": self.state.optimizer}
        extras = {
            "phase": self._phase.name,
            "seed": self._config.seed,
            "cost": self.ledger.as_dict(),
            "passages_cut": sorted(self._pipeline.prompts.passages_cut),
        }
        self._checkpoints.save(self.step, trees, extras)


def split_trainable(config: RunConfig, phase: Phase, pipeline: Pipeline) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """(trainable, frozen), each {"embedder" | "generator": {collection: parameters}}."""
    trained = {"embedder": "params", "generator": trained_collection(config)}
    trainable: dict[str, Tree] = {}
    frozen: dict[str, Tree] = {}
    for name in trained:
        variables = getattr(pipeline, name).variables
        moves = {trained[name]} if name in phase.trains else set()
        trainable[name] = {collection: tree for collection, tree in variables.items() if collection in moves}
        frozen[name] = {collection: tree for collection, tree in variables.items() if collection not in moves}
    return {name: tree for name, tree in trainable.items() if tree}, {
        name: tree for name, tree in frozen.items() if tree
    }
