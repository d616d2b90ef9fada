"""Learning-rate search: the generator's rates one after the other, the embedder's all at once.

Each model's rates are searched by themselves, as in Lawton et al. 2025: the generator's over the untrained embedder,
then the embedder's over the best of those generators; joint training takes both winners. `--grid=2d` trains joint pairs
instead. Results are kept in the run folder, and the same command continues where it stopped:

    search.json          what is searched, every trial's figures, the winner
    trials/              a folder for each of the generator's and joint trials: checkpoints, metrics, dev predictions
    likelihoods.jsonl    of the frozen generator, for the embedder's copies
    generations.jsonl    its answers, by prompt
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ragjax.config import RunConfig, SearchConfig
from ragjax.costs import Ledger
from ragjax.data.dataset import Dataset, load_dataset
from ragjax.data.questions import Question
from ragjax.errors import DivergedError, UserError
from ragjax.evaluation import CachedGenerations, evaluate, mean_recall, rates_table, summarise
from ragjax.fields import changed_flags
from ragjax.files import read_json_lines, write_json
from ragjax.generation import check_decoding
from ragjax.parallel import refuse_several_processes
from ragjax.rates.stacked import Copy, train_stacked
from ragjax.reporting import plot_rates
from ragjax.runs import Run, RunFolder, prepare
from ragjax.training.loop import PhaseResult, train_phase
from ragjax.training.reuse import adopt, source_run
from ragjax.training.run import (
    check_batches,
    check_lengths,
    check_training_answers,
    settle_strategy,
    warn_of_repeated_questions,
    warn_of_unread_flags,
    with_phases,
)
from ragjax.training.sampling import total_steps
from ragjax.training.signals import StackableAssembler
from ragjax.training.strategies import Phase, needs_generator, phases_of
from ragjax.voice import say

# Number of parts that halving cuts a training into.
_RUNGS = 3
MODELS = ("embedder", "generator")
# What a choice by needs answers.
ANSWER_SCORES = ("f1", "em")

Trial = dict[str, Any]


def search_rates(config: RunConfig, options: SearchConfig, prepared: Run | None = None) -> dict[str, Any]:
    """Runs a search to its end, or prints the result of one that has ended.

    Args:
      config: flags of the runs. A learning rate that it sets is used, not searched, and of a phase that another run
        has finished (`embedder_run`, `generator_run`) no rate is searched. `run_dir` may be empty for
        runs/search-STRATEGY; `eval_limit` is the number of dev questions that are answered.
      options: what is searched, and how the winner is chosen.
      prepared: a run whose data, untrained models and index are those of the configuration; loaded otherwise.

    Returns:
      What search.json holds: {"flags", "options", "inputs", "strategy", "trials": [...], "winner": {model: rate},
      "cost"}. A trial is {"phase", "rates", "steps", "diverged", "dev_loss", "start_loss", "em", "f1", "recall_at_5",
      "cost"}, None for what was not measured; what the embedder's copies cost together stands in the first of them.

    Raises:
      UserError: bad input, a folder that belongs to another search, or one of several processes.
    """
    refuse_several_processes()
    config = dataclasses.replace(config, run_dir=config.run_dir or f"runs/search-{config.strategy}")
    rates = {model: options.rates(model) for model in MODELS}
    strategy, dataset = settle_strategy(config)
    dataset = prepared.dataset if prepared else dataset or load_dataset(config.data)
    phases = _phases(dataclasses.replace(config, strategy=strategy), options)
    check_decoding(config)
    _check_dev(config, options, dataset, phases)
    check_batches(config, phases)
    # Of --dev_limit the command has a default of its own.
    warn_of_unread_flags(strategy, phases, dataclasses.replace(config, dev_limit=RunConfig.dev_limit), options)
    warn_of_repeated_questions(dataset, phases)
    files = RunFolder(Path(config.run_dir))
    with files.held():
        record = _open_record(files, config, options)
        if "winner" not in record:

            def check(inputs: Mapping[str, Any]) -> None:
                if record.setdefault("inputs", inputs) != inputs:
                    raise UserError(
                        f"{files.path} was begun with other models or data: bring those back or choose another."
                    )

            answers = options.selection(config.decode) in ANSWER_SCORES
            generates = needs_generator(phases, answers)
            if prepared:
                run = dataclasses.replace(prepared, config=config, files=files)
                check(run.inputs())
            else:
                run = prepare(config, dataset, check=check, announced=MODELS, with_generator=generates)
            check_lengths(run, phases, dataset.dev[: config.eval_limit or None] if answers else ())
            record["strategy"] = strategy
            _Search(run, options, record).run(phases, rates)
        _print(files, record, config, options.selection(config.decode))
        return record


def _check_dev(config: RunConfig, options: SearchConfig, dataset: Dataset, phases: Sequence[Phase]) -> None:
    """Raises UserError where the dev questions cannot tell which rate is best."""
    if config.dev_every == 0:
        raise UserError("--dev_every=0 measures nothing, and the search chooses by the dev questions: leave it out.")
    for split in ("train", "dev"):
        if not getattr(dataset, split):
            raise UserError(
                f"{dataset.folder} has no {split} questions, which the search needs: add {dataset.split_file(split)}."
            )
    selection = options.selection(config.decode)
    if selection in ANSWER_SCORES and config.decode != "none":
        dataset.check_answers("dev", dataset.dev[: config.eval_limit or None], f"--select={selection}")
    check_training_answers(config, dataset, phases)
    if selection in ANSWER_SCORES and config.decode == "none":
        raise UserError(f"--select={selection} needs answers, and --decode=none gives none: choose --decode=concat.")
    if selection == "recall_at_5" and not any(question.positive_ids for question in dataset.dev):
        raise UserError(
            f"no dev question of {dataset.folder} has positive_ids, so Recall@5 is not known: label some, or choose "
            "--decode=concat, which has answers to choose by."
        )
    if selection != "dev_loss" and not options.halving:
        return
    for phase in phases:
        if not any(map(phase.signal.learns_from, dataset.dev)):
            raise UserError(
                f"no dev question of {dataset.folder} has positive_ids, so there is no dev loss to choose by: label "
                "some, or choose by --select=f1 without --halving."
            )


def _phases(config: RunConfig, options: SearchConfig) -> Sequence[Phase]:
    """What is searched, in order."""
    phases = phases_of(config)
    if not phases:
        raise UserError(f"--strategy={config.strategy} trains nothing, so there is no rate to search: choose another.")
    if options.grid == "2d" and config.strategy != "joint":
        raise UserError(
            f"--grid=2d searches pairs of rates, which --strategy={config.strategy} does not train together."
        )
    stacked = any("embedder" in phase.trains and not source_run(config, phase) for phase in phases)
    if config.refresh_passages and stacked and options.grid == "1d":
        raise UserError(
            f"--refresh_passages={config.refresh_passages} makes vectors for one embedder, and a search trains copies "
            "of it at many rates together: search without it, or joint pairs with --grid=2d."
        )
    if all(source_run(config, phase) for phase in phases):
        raise UserError("--embedder_run and --generator_run leave no rate to search: leave one of them out.")
    if config.strategy == "joint" and options.grid == "1d":
        # The rates of the two phases serve joint training, as in the paper.
        return phases_of(dataclasses.replace(config, strategy="two_phase"))
    return phases


def _open_record(files: RunFolder, config: RunConfig, options: SearchConfig) -> dict[str, Any]:
    """search.json, or its beginning for a new search."""
    asked = {"flags": dataclasses.replace(config, run_dir=""), "options": options}
    if not files.search_file.is_file():
        return {**{part: dataclasses.asdict(values.located()) for part, values in asked.items()}, "trials": []}
    return files.read_asked("search", files.search_file, asked, needed=["trials"])


class _Search:
    """A search that is going on; `record` grows with it."""

    def __init__(self, run: Run, options: SearchConfig, record: dict[str, Any]):
        """run: untrained; phases after the first may start from one with a tuned generator."""
        self._run, self._options, self._record = run, options, record
        self._config, self._files = run.config, run.files
        self._selection = options.selection(run.config.decode)
        self._rungs = _RUNGS if options.halving else 1
        self._asked: Sequence[Question] = run.dataset.dev[: run.config.eval_limit or None]

    def run(self, phases: Sequence[Phase], rates: Mapping[str, Sequence[float]]) -> None:
        """Every phase's rates, then the winner."""
        given = {"embedder": self._config.embedder_lr, "generator": self._config.generator_lr}
        grid = {model: rates[model] if rate is None else (rate,) for model, rate in given.items()}
        winner, start = {}, self._run
        for phase in phases:
            if source_run(self._config, phase):
                taken = adopt(start, phase)
                if "embedder" not in phase.trains:  # as in training, no phase sees an embedder that another has tuned
                    start = with_phases(start, {phase.name: taken})
                continue
            tried = [
                dict(zip(phase.trains, values, strict=True))
                for values in itertools.product(*(grid[model] for model in phase.trains))
            ]
            if phase.trains == ("embedder",):
                trials = self._stacked(phase, [trial["embedder"] for trial in tried], start)
                winner |= self._best(trials)["rates"]
                continue
            trials = self._one_by_one(phase, tried, start)
            best = self._best(trials)["rates"]
            winner |= best
            if phase is not phases[-1] and any(later.signal.scores_once for later in phases):
                result = self._train(phase, best, start)
                start = with_phases(start, {phase.name: result})
        cost = Ledger(_sum(*(trial["cost"] for trial in self._record["trials"])))
        self._record |= {"winner": winner, "cost": cost.summary()}
        write_json(self._files.search_file, self._record)

    # --- trials that need a run each

    def _one_by_one(self, phase: Phase, tried: Sequence[dict[str, float]], start: Run) -> list[Trial]:
        known = {_name(phase.name, trial["rates"]): trial for trial in self._trials_of(phase)}
        trials = [known.get(_name(phase.name, rates)) or _new_trial(phase, rates) for rates in tried]
        if any(trial["steps"] == 0 for trial in trials) and self._options.grid == "2d":
            self._announce(phase, tried, start)
        steps, alive = self._steps(phase), list(trials)
        for rung in range(self._rungs):
            end = self._end_of(rung, steps)
            for trial in alive:
                if trial["steps"] < end and not trial["diverged"]:
                    self._advance(phase, trial, start, end)
            if end < steps:
                alive = sorted(alive, key=_loss)[: -(-len(alive) // 2)]
        for trial in alive:
            if self._selection != "dev_loss" and trial[self._selection] is None and not trial["diverged"]:
                result = self._train(phase, trial["rates"], start)
                self._score(trial, with_phases(start, {phase.name: result}), None)
                self._keep(trial)
        return trials

    def _advance(self, phase: Phase, trial: Trial, start: Run, end: int) -> None:
        try:
            result = self._train(phase, trial["rates"], start, end)
        except DivergedError as error:
            say(f"{_name(phase.name, trial['rates'])} diverged: {error}")
            trial["diverged"] = True
        else:
            lines = read_json_lines(self._files.trial(_name(phase.name, trial["rates"])).metrics_file)
            losses = [line["dev_loss"] for line in lines if "dev_loss" in line]
            trial |= {"steps": end, "start_loss": losses[0], "dev_loss": losses[-1], "cost": result.cost.as_dict()}
        self._keep(trial)

    def _train(self, phase: Phase, rates: Mapping[str, float], start: Run, end: int | None = None) -> PhaseResult:
        """A trial's training up to a step, or what it has trained."""
        flags = {f"{model}_lr": rate for model, rate in rates.items()}
        # Trials are compared where they stand after the same number of steps.
        config = dataclasses.replace(self._config, keep="last", **flags)
        files = self._files.trial(_name(phase.name, rates))
        trial = dataclasses.replace(start, config=config, files=files)
        return train_phase(trial, phase, end, measure_every=self._end_of(0, self._steps(phase)))

    def _announce(self, phase: Phase, tried: Sequence[dict[str, float]], start: Run) -> None:
        """What all pairs will cost, from the second step of the first one."""
        one, two = (self._train(phase, tried[0], start, end).cost.total() for end in (1, 2))
        steps = len(tried) * self._steps(phase)
        seconds, flops = (two.seconds - one.seconds) * steps, (two.flops - one.flops) * steps
        say(
            f"{len(tried)} pairs of {self._steps(phase)} steps: about {seconds / 3600:,.2f} hours and "
            f"{flops / 1e15:,.2f} PFLOPs of training; Ctrl-C stops; the same command continues.",
            flush=True,
        )

    # --- rates that share one run

    def _stacked(self, phase: Phase, rates: Sequence[float], start: Run) -> list[Trial]:
        if found := self._trials_of(phase):
            return found
        assembler = phase.signal.make_assembler(start, phase.trains)
        if not isinstance(assembler, StackableAssembler):
            raise TypeError(
                f"the signal {phase.signal.name!r} has no assembler whose questions several embedders share"
            )
        result = train_stacked(start, rates, assembler, self._rungs)
        answers = self._selection in ANSWER_SCORES
        generations = (
            CachedGenerations(start.generator, start.arrangement, self._files.generations_file) if answers else None
        )
        trials: list[Trial] = []
        for copy in result.copies:
            trial: Trial = _new_trial(phase, {"embedder": copy.rate}) | {"steps": copy.steps, "diverged": copy.diverged}
            trial |= _loss_figures(copy, result.start_losses)
            if copy.params is not None and not trial["diverged"]:
                trained = start.with_trained({"embedder": {"params": jax.tree.map(jnp.asarray, copy.params)}})
                self._score(trial, trained, generations)
            trials.append(trial)
        trials[0]["cost"] = _sum(trials[0]["cost"], result.cost.as_dict())
        # All at once: a search that was cut off before repeats the copies, whose likelihoods and answers are there.
        self._record["trials"] += trials
        self._record["pairs_scored"] = result.pairs
        write_json(self._files.search_file, self._record)
        return trials

    # --- what they share

    def _score(self, trial: Trial, run: Run, generations: CachedGenerations | None) -> None:
        """Answers the dev questions end to end, where that is what rates are chosen by; else what is found for them."""
        if self._selection not in ANSWER_SCORES:
            trial["recall_at_5"] = self._recall(run)
            return
        path = self._files.predictions(_name(trial["phase"], trial["rates"]))
        measured = evaluate(run.pipeline, self._asked, path, self._config, generations=generations)
        ledger = Ledger(trial["cost"])
        ledger.add("evaluation", measured.cost)
        means = summarise(measured.records)
        trial |= {"cost": ledger.as_dict()} | {key: means[key] for key in ("em", "f1", "recall_at_5")}

    def _recall(self, run: Run) -> float | None:
        store = run.pipeline.store
        rows = run.retrieve([question.question for question in self._asked], min(5, len(store))).passage_rows
        return mean_recall(store, self._asked, rows)

    def _best(self, trials: Sequence[Trial]) -> Trial:
        """The winner among the trials that went to the end; of equal scores the one with the lower dev loss."""
        alive = [trial for trial in trials if not trial["diverged"]]
        if not alive:
            raise UserError(f"every rate of --strategy={self._config.strategy} diverged: give lower rates.")
        steps = max(trial["steps"] for trial in alive)
        finished = [trial for trial in alive if trial["steps"] == steps]
        if self._selection == "dev_loss":
            return min(finished, key=_loss)
        return min(finished, key=lambda trial: (-trial[self._selection], _loss(trial)))

    def _trials_of(self, phase: Phase) -> list[Trial]:
        return [trial for trial in self._record["trials"] if trial["phase"] == phase.name]

    def _keep(self, trial: Trial) -> None:
        """Writes search.json with this trial's figures in it."""
        if not any(trial is known for known in self._record["trials"]):
            self._record["trials"].append(trial)
        write_json(self._files.search_file, self._record)

    def _steps(self, phase: Phase) -> int:
        return total_steps(self._config, len(self._run.dataset.train), phase.batch_size(self._config))

    def _end_of(self, rung: int, steps: int) -> int:
        return min(-(-steps // self._rungs) * (rung + 1), steps)


def _new_trial(phase: Phase, rates: Mapping[str, float]) -> Trial:
    figures = dict.fromkeys(("start_loss", "dev_loss", "em", "f1", "recall_at_5"))
    return {"phase": phase.name, "rates": dict(rates), "steps": 0, "diverged": False, **figures, "cost": {}}


def _loss_figures(copy: Copy, start_losses: np.ndarray) -> dict[str, float | None]:
    """A copy's dev loss, and how sure its change is; {} where no dev question has a loss."""
    if copy.diverged or not len(copy.dev_losses):
        return {}
    change = copy.dev_losses - start_losses
    return {
        "start_loss": float(start_losses.mean()),
        "dev_loss": copy.mean_loss,
        "dev_loss_change_se": float(change.std(ddof=1) / math.sqrt(len(change))) if len(change) > 1 else None,
    }


def _sum(*costs: Mapping[str, Any]) -> dict[str, Any]:
    total = Ledger()
    for cost in costs:
        total.merge(Ledger(cost))
    return total.as_dict()


def _name(phase: str, rates: Mapping[str, float]) -> str:
    return "-".join([phase, *(f"{rate:g}" for rate in rates.values())])


def _loss(trial: Trial) -> float:
    return math.inf if trial["diverged"] or trial["dev_loss"] is None else trial["dev_loss"]


def _print(files: RunFolder, record: Mapping[str, Any], config: RunConfig, selection: str) -> None:
    say(f"\n{record['strategy']}, chosen by {selection} on the dev questions\n")
    say(rates_table(record["trials"]))
    plot_rates(record["trials"], selection, files.search_plot)
    cost = record["cost"]
    say(f"\ntraining {cost['seconds']:,.1f} s, selection apart {cost['evaluation']['seconds']:,.1f} s")
    say(f"plot: {files.search_plot}\nNext:\n  python -m ragjax.train {' '.join(winner_flags(record, config))}")


def winner_flags(record: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Flags of a training with the winner's rates and all else as it was searched, from any directory."""
    rates = {f"{model}_lr": rate for model, rate in record["winner"].items()}
    # The search's own folder, and limits that it reads in its own way.
    apart = {name: getattr(RunConfig(), name) for name in ("run_dir", "eval_limit", "dev_limit")}
    chosen = dataclasses.replace(config.located(), strategy=record["strategy"], **apart, **rates)
    return [f"--strategy={record['strategy']}", *changed_flags(chosen, RunConfig(strategy=record["strategy"]))]
