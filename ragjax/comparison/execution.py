"""The runs of a comparison, one after another: what they will take, the searches before them, what failed."""

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import jax

from ragjax.comparison.estimate import Pace, measure_pace
from ragjax.comparison.matrix import Planned
from ragjax.config import CompareConfig, RunConfig, SearchConfig
from ragjax.data.dataset import Dataset
from ragjax.errors import UserError, reason
from ragjax.evaluation import copy_predictions
from ragjax.files import free_bytes, read_json_object, write_atomic
from ragjax.models.lora import COLLECTION
from ragjax.pipeline import load_untrained_embedder, load_untrained_generator
from ragjax.pretrained import Embedder, Generator, init_lora
from ragjax.rates import search_rates
from ragjax.reporting import Cell
from ragjax.runs import Run, RunFolder, prepare
from ragjax.training.run import complete
from ragjax.training.strategies import STRATEGIES, needs_generator
from ragjax.voice import duration, say, warn

# Dev questions for the dev loss of a search: enough that it tells rates apart.
_SEARCH_DEV = 100


class Execution:
    """A comparison that is going on."""

    def __init__(self, config: RunConfig, options: CompareConfig, cells: Sequence[Planned], dataset: Dataset):
        self._config, self._options, self._dataset = config, options, dataset
        self._files = RunFolder(Path(config.run_dir))
        self._cells = list(cells)  # as they were planned; with what they take over, once they have run
        self._failures: dict[int, str] = {}  # by place in the cells
        self._paces: dict[str, Pace] = {}
        self._models: dict[str, tuple[Embedder, Generator | None]] = {}  # of at most one pair
        self._prepared: dict[str, Run] = {}  # likewise

    # --- what it will take

    def plan(self) -> None:
        """Prints what is left to run, and what that takes. Raises UserError where the disk has no room for it."""
        left = [cell for cell in self._cells if not cell.files.is_finished]
        if not left:
            return
        for pair in dict.fromkeys(cell.pair for cell in left):
            config = next(cell.config for cell in left if cell.pair == pair)
            self._paces[pair] = measure_pace(config, self._dataset, *self._load(pair, config))
        expected = self._expected(left)
        lines = [(cell.describe(), duration(seconds)) for cell, seconds in expected]
        width = max(len(name) for name, _ in lines)
        say(f"\n{len(left)} of {len(self._cells)} runs are left, about\n")
        say("\n".join(f"  {name.ljust(width)}  {took:>10}" for name, took in lines))
        needed = sum(self._paces[cell.pair].cell_bytes(cell) for cell, _ in expected)
        free = free_bytes(self._files.path)
        memory = max(pace.memory_bytes([c for c in left if c.pair == pair]) for pair, pace in self._paces.items())
        paces = () if self._config.index_dir else self._paces.values()
        encoding = sum(pace.encode_seconds(self._dataset) for pace in paces)
        say(
            f"\nIn all about {duration(sum(seconds for _, seconds in expected))}, and up to "
            f"{duration(encoding)} of encoding where the passages' vectors are not in the cache; {needed / 1e9:.1f} GB "
            f"of disk ({free / 1e9:.1f} GB are free); {memory / 1e9:.1f} GB of memory for weights and optimizer, "
            "activations apart.\n",
            flush=True,
        )
        if needed > free:
            raise UserError(
                f"the comparison needs {needed / 1e9:.1f} GB in {self._files.path}, where {free / 1e9:.1f} GB are "
                "free: free some, choose another --run_dir, or compare fewer rows, seeds or models."
            )

    def _expected(self, cells: Sequence[Planned]) -> list[tuple[Planned, float]]:
        """Seconds of each, as if those before it had ended well."""
        found, earlier = [], [cell for cell in self._cells if cell.files.is_finished]
        asked = {cell.pair for cell in earlier}
        for cell in cells:
            with contextlib.suppress(UserError):  # said when it runs
                cell = cell.taking_over(earlier)
            seconds = self._paces[cell.pair].cell_seconds(cell, self._dataset)
            if cell.pair not in asked and cell.phases:
                seconds += self._paces[cell.pair].answers_seconds(cell.config, self._dataset)
            asked.add(cell.pair)
            earlier.append(cell)
            found.append((cell, seconds))
        return found

    # --- running it

    def run(self) -> None:
        """Every cell that is not finished; a failure is noted, and the others go on."""
        finished: list[Planned] = []
        spent = expected = 0.0
        for place, cell in enumerate(self._cells):
            is_new, began = not cell.files.is_finished, time.perf_counter()
            if is_new:
                rest = self._expected([c for c in self._cells[place:] if not c.files.is_finished])
                scale = spent / expected if expected else 1.0
                say(
                    f"\n[{place + 1}/{len(self._cells)}] {cell.describe()}: about {duration(rest[0][1] * scale)}, "
                    f"{duration(sum(seconds for _, seconds in rest) * scale)} in all",
                    flush=True,
                )
            try:
                cell = self._finish(cell.taking_over(finished))
            except UserError as error:
                self._fail(place, str(error))
            except Exception as error:  # out of memory, say: hours of other runs must not be lost with this one
                cell.files.path.mkdir(parents=True, exist_ok=True)
                path = cell.files.path / "error.txt"
                write_atomic(path, "".join(traceback.format_exception(error)))
                self._fail(place, f"{type(error).__name__}: {reason(error)} (the traceback is in {path})")
            else:
                finished.append(cell)
                self._cells[place] = cell
                if is_new:
                    spent, expected = spent + time.perf_counter() - began, expected + rest[0][1]

    def _fail(self, place: int, sentence: str) -> None:
        self._failures[place] = sentence
        warn(f"{self._cells[place].describe()} failed: {sentence}")

    def _finish(self, cell: Planned) -> Planned:
        """Brings a cell to its end, and returns it with the rates that were searched for it."""
        config = cell.config
        if self._options.search and config.embedder_lr is None and (kind := _embedder_learns_from(cell)):
            rate = self._searched(cell, kind)
            cell = dataclasses.replace(cell, config=dataclasses.replace(config, embedder_lr=rate))
        if cell.files.is_finished:
            complete(cell.config)  # checks that it is the same run
            return cell
        run = self._prepare(cell)
        self._share_before(cell)
        complete(cell.config, run)
        return cell

    def _searched(self, cell: Planned, kind: str) -> float:
        """The rate that the dev questions choose for an embedder of this pair that learns from labels or answers."""
        first = self._options.seeds[0]
        files = self._files.search(cell.pair, kind)
        strategy = "embedder" if kind == "labels" else "two_phase"
        shared = dataclasses.replace(
            cell.config,
            strategy=strategy,
            objective=self._config.objective,
            seed=first,
            run_dir=str(files.path),
            dev_limit=max(self._config.dev_limit, _SEARCH_DEV),
            eval_limit=0,
            embedder_run="",
            generator_run="",
        )
        if kind == "answers":
            (phase,) = STRATEGIES["generator"]
            sources = [c for c in self._cells if c.pair == cell.pair and c.config.seed == first and phase in c.phases]
            if ready := [c.config.run_dir for c in sources if c.files.is_finished]:
                shared = dataclasses.replace(shared, generator_run=ready[0])
            else:
                rate = phase.learning_rates(shared)["generator"]
                shared = dataclasses.replace(shared, generator_lr=rate)
        options = SearchConfig(
            embedder_rates=self._options.embedder_rates, select="recall_at_5" if kind == "labels" else "dev_loss"
        )
        found = files.search_file.is_file() and read_json_object(files.search_file)
        if found and "winner" in found:
            return found["winner"]["embedder"]
        say(f"searching the embedder's rate for learning from {kind} ({cell.pair})", flush=True)
        run = self._prepare(dataclasses.replace(cell, config=shared))
        return search_rates(shared, options, run)["winner"]["embedder"]

    def _prepare(self, cell: Planned) -> Run:
        """The cell's models, data and index, with adapters of its own seed."""
        config = cell.config
        if cell.pair not in self._prepared:
            self._prepared.clear()
            # What was compiled for other models is of no use any more, and programs hold memory maps, which run out.
            jax.clear_caches()
            run = prepare(config, self._dataset, models=self._load(cell.pair, config))
            self._prepared[cell.pair] = run
            self._models.clear()
        run = self._prepared[cell.pair]
        if config.lora_rank and run.pipeline.reader:
            run = run.with_trained({"generator": {COLLECTION: init_lora(run.generator, config.seed)}})
        return run

    def _load(self, pair: str, config: RunConfig) -> tuple[Embedder, Generator | None]:
        if pair not in self._models:
            self._models.clear()
            phases = [phase for cell in self._cells for phase in cell.phases]
            generates = needs_generator(phases, answers=config.decode != "none")
            generator = load_untrained_generator(config) if generates else None
            self._models[pair] = load_untrained_embedder(config), generator
        return self._models[pair]

    def _share_before(self, cell: Planned) -> None:
        """Gives a cell the answers of the untrained models, where another one of its pair has them."""
        config = cell.config
        own = cell.files.measured(config.eval_split, "before")
        for other in self._cells:
            source = other.files.measured(config.eval_split, "before")
            if other.pair == cell.pair and source.exists() and not own.exists():
                copy_predictions(source, own)

    # --- what it found

    def reported(self) -> list[Cell]:
        """What the report is made from."""
        return [
            Cell(cell.row, cell.config.embedder, cell.config.generator, cell.config.seed, cell.files, failure)
            for cell, failure in ((cell, self._failures.get(i, "")) for i, cell in enumerate(self._cells))
        ]

    def searches(self) -> list[RunFolder]:
        """Those that have come to their end."""
        pairs = dict.fromkeys(cell.pair for cell in self._cells)
        folders = [self._files.search(pair, kind) for pair in pairs for kind in ("labels", "answers")]
        return [folder for folder in folders if folder.search_file.is_file()] if self._options.search else []


def _embedder_learns_from(cell: Planned) -> str | None:
    """ "labels" or "answers"; None where its embedder stays as it is."""
    for phase in cell.phases:
        if "embedder" in phase.trains:
            return "answers" if phase.signal.reads_answers else "labels"
    return None
