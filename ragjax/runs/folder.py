"""The run folder: what it holds and under which names, which process may write it, and whose run it is.

    config.json          flags, phases, inputs with their hashes, versions
    metrics.jsonl        the figures of each step
    tensorboard/         the same as events, a folder for each phase
    checkpoints/         a folder for each phase: the newest
    best/                the same: the best by the dev questions
    likelihoods.jsonl    of a frozen generator
    predictions/         SPLIT.before.jsonl, SPLIT.after.jsonl, and those of ragjax.evaluate
    summary.json         once the run has ended
    report.html          the same as a page
    .lock                held by the process that writes

The folder of a learning-rate search has search.json, search.png, generations.jsonl (answers by prompt) and trials/ (a
run folder for each trial) beside the likelihoods, the predictions and the lock; that of a comparison has
comparison.json, its report, cells/ (run folders) and searches/. No other module spells these names.
"""

import contextlib
import dataclasses
import secrets
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ragjax.arrays import Tree
from ragjax.checkpoints import Checkpoints
from ragjax.config import RunConfig
from ragjax.errors import UserError, reason
from ragjax.fields import Checked, differing_fields, flag_text, recorded_value
from ragjax.files import read_json_object, remove, take_lock, write_atomic, write_json
from ragjax.parallel import largest_of_all, process_count, wait_for_all
from ragjax.paths import expanded
from ragjax.runs.summary import Summary
from ragjax.voice import is_first

# Seconds, at most, until all hosts see what one of them has written.
_SEEN_AFTER = 20.0
# Flags that may differ where a run goes on: what it is computed on, which changes results by rounding alone, and how
# often its state is saved and how many times.
_FREE = ("parallelism", "mesh", "checkpoint_every", "keep_checkpoints")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What config.json says of a run."""

    config: RunConfig
    phases: tuple[str, ...]  # their names, in order
    inputs: Mapping[str, Mapping[str, str]]  # {"embedder" | "generator" | "data": {"sha256", ...}}


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where each part of a run stands; nothing is made or read before it is asked for."""

    path: Path

    def __post_init__(self):
        object.__setattr__(self, "path", Path(expanded(self.path)))

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_folder(self) -> Path:
        return self.path / "tensorboard"

    def events(self, phase: str) -> Path:
        return self.events_folder / phase

    def checkpoints(self, phase: str) -> Path:
        return self.path / "checkpoints" / phase

    def best_checkpoints(self, phase: str) -> Path:
        return self.path / "best" / phase

    @property
    def likelihoods_file(self) -> Path:
        return self.path / "likelihoods.jsonl"

    @property
    def predictions_folder(self) -> Path:
        return self.path / "predictions"

    def predictions(self, name: str) -> Path:
        return self.predictions_folder / f"{name}.jsonl"

    def measured(self, split: str, moment: str) -> Path:
        """The predictions that training makes, at the moment "before" or "after"."""
        return self.predictions(f"{split}.{moment}")

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def search_file(self) -> Path:
        return self.path / "search.json"

    @property
    def search_plot(self) -> Path:
        return self.path / "search.png"

    @property
    def generations_file(self) -> Path:
        return self.path / "generations.jsonl"

    def trial(self, name: str) -> "RunFolder":
        """The run folder of one trial of a search."""
        return RunFolder(self.path / "trials" / name)

    @property
    def comparison_file(self) -> Path:
        return self.path / "comparison.json"

    def cell(self, *names: str) -> "RunFolder":
        """The run folder of one cell of a comparison."""
        return RunFolder(self.path.joinpath("cells", *names))

    def search(self, *names: str) -> "RunFolder":
        """The folder of one of a comparison's searches."""
        return RunFolder(self.path.joinpath("searches", *names))

    @property
    def is_begun(self) -> bool:
        """Whether a run has left its configuration here."""
        return self.config_file.is_file()

    @property
    def is_finished(self) -> bool:
        return self.summary_file.is_file()

    @contextlib.contextmanager
    def held(self) -> Generator[None, None, None]:
        """Makes the folder and holds it for this process: two at once would mix their records.

        The lock goes with the process, however that ends. Of several processes that JAX has joined the first holds it
        for all. Raises UserError where another process has it, or where the folder cannot be written.
        """
        if not is_first():
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"--run_dir={self.path} cannot be written ({error.strerror}): choose another folder."
            ) from error
        with lock:
            take_lock(
                lock.fileno(), f"Another process is working on {self.path}: wait for it or choose another --run_dir."
            )
            yield

    def check_shared(self) -> None:
        """Raises UserError where the folder is not the same one for all processes. All of them come here."""
        if process_count() == 1:
            return
        mark, token = self.path / ".processes", str(largest_of_all(secrets.randbits(30)))
        write_atomic(mark, token)
        wait_for_all("the mark is written")
        until = time.monotonic() + _SEEN_AFTER
        while not (seen := mark.is_file() and mark.read_text(encoding="utf-8") == token) and time.monotonic() < until:
            time.sleep(0.2)
        is_missing = largest_of_all(not seen)  # somewhere, so that all end alike
        remove(mark)
        if is_missing:
            raise UserError(
                f"--run_dir={self.path} is not the same folder for all processes: choose one on a file system that all "
                "hosts share."
            )

    def begin(
        self,
        record: RunRecord,
        learning_rates: Mapping[str, Mapping[str, float]],
        index: Mapping[str, Any],
        versions: Mapping[str, str],
        devices: Sequence[str],
    ) -> None:
        """Writes config.json: whose run this is, and beside that what its phases, index, packages and devices are.

        learning_rates: peak rates by phase and model. Raises UserError where the file cannot be written.
        """
        content = {
            "flags": dataclasses.asdict(record.config.located()),
            "phases": record.phases,
            "learning_rates": learning_rates,
            "inputs": record.inputs,
            "index": index,
            "versions": versions,
            "devices": devices,
        }
        write_json(self.config_file, content)

    def record(self) -> RunRecord:
        """What config.json says. Raises UserError where the folder holds no run of this version."""
        if not self.is_begun:
            raise UserError(
                f"{self.path} holds no {self.config_file.name}: give --run_dir the folder of a ragjax.train run."
            )
        content = self._content()
        try:
            return RunRecord(RunConfig(**content["flags"]), tuple(content["phases"]), content["inputs"])
        except TypeError as error:  # a flag that this version does not know, too
            raise UserError(
                f"{self.config_file} does not describe a run of this version ({reason(error)}): give --run_dir the "
                "folder of a ragjax.train run."
            ) from error
        except UserError as error:  # a flag's value
            raise UserError(f"{self.config_file} does not describe a run of this version: {error}") from error

    def _content(self) -> dict[str, Any]:
        """config.json as it is written. Raises UserError where it is no run's, but a model's, say."""
        content = read_json_object(self.config_file)
        for part, kind in (("flags", dict), ("phases", list), ("inputs", dict)):
            if not isinstance(content.get(part), kind):
                raise UserError(
                    f"{self.config_file} does not describe a run of this version (it lacks {part!r}): give --run_dir "
                    "the folder of a ragjax.train run, or a new one for training."
                )
        return content

    def check_flags(self, config: RunConfig) -> None:
        """Raises UserError where the folder holds a run with other flags. --run_dir may differ, a folder can move, and
        what says how devices work together or when a state is saved: a run goes on where there is less or more room.
        """
        if not self.is_begun:
            return
        recorded = self._content()["flags"]
        if differ := [name for name in differing_fields(recorded, config) if name not in ("run_dir", *_FREE)]:
            details = ", ".join(
                f"--{name}={flag_text(recorded_value(recorded, config, name))} (now {flag_text(getattr(config, name))})"
                for name in differ
            )
            raise UserError(f"{self.path} holds a run with {details}: repeat those flags or choose another --run_dir.")

    def read_asked(
        self, kind: str, file: Path, asked: Mapping[str, Checked], needed: Sequence[str] = (), free: Sequence[str] = ()
    ) -> dict[str, Any]:
        """What the `file` of a search or a comparison (`kind`) says, where that was begun with what is asked now.

        Args:
          asked: the configurations that it records, by their names in it.
          needed: what else it holds.
          free: fields that may differ.

        Raises:
          UserError: it was begun with something else, or is damaged.
        """
        record = read_json_object(file)
        if missing := {*asked, *needed} - record.keys():
            raise UserError(f"{file} lacks {min(missing)!r}: restore it or choose another --run_dir.")
        for part, values in asked.items():
            if differ := [name for name in differing_fields(record[part], values) if name not in (*free, *_FREE)]:
                before = recorded_value(record[part], values, differ[0])
                was, now = flag_text(before), flag_text(getattr(values, differ[0]))
                raise UserError(
                    f"{self.path} holds a {kind} with --{differ[0]}={was} (now {now}): repeat that flag or choose "
                    "another --run_dir."
                )
        return record

    def check_inputs(self, inputs: Mapping[str, Mapping[str, str]]) -> None:
        """Raises UserError where one of the inputs, {name: {"sha256"}}, is no longer what the run was started with."""
        if not self.is_begun:
            return
        recorded = self._content()["inputs"]
        for name, now in inputs.items():
            if name not in recorded:  # the generator of a run that did without one
                continue
            before, sha256 = recorded[name]["sha256"], now["sha256"]
            if before != sha256:
                raise UserError(
                    f"{self.path} was made with a different --{name} (sha256 {before[:12]}, now {sha256[:12]}): "
                    "restore the original or choose another --run_dir."
                )

    def read_summary(self) -> Summary | None:
        """What a finished run has found; None where the run is not finished. Raises UserError where it is damaged."""
        if not self.is_finished:
            return None
        try:
            return Summary(**read_json_object(self.summary_file))
        except TypeError as error:  # a field too many or too few
            raise UserError(
                f"{self.summary_file} does not describe a run of this version ({reason(error)}): run ragjax.train with "
                "another --run_dir."
            ) from error

    def write_summary(self, summary: Summary) -> None:
        """Ends the run. Raises UserError where the file cannot be written."""
        write_json(self.summary_file, dataclasses.asdict(summary))


@dataclasses.dataclass(frozen=True)
class TrainedPhase:
    """What is kept of a phase: its best checkpoint, or its last where no dev questions told the best."""

    name: str
    step: int
    trained: dict[str, dict[str, Tree]]  # {"embedder" | "generator": {collection: parameters}} on the host


def read_phases(files: RunFolder, phases: Sequence[str]) -> list[TrainedPhase]:
    """What a run has trained so far, phase by phase, up to the first that has no checkpoint.

    Raises:
      UserError: there should be a checkpoint and is none, or one is damaged.
    """
    found = []
    for name in phases:
        kept = map(Checkpoints, (files.best_checkpoints(name), files.checkpoints(name)))
        checkpoints = next((each for each in kept if each.steps()), None)
        if checkpoints is None:
            break
        step, trees, _ = checkpoints.restore({"trainable": None})
        found.append(TrainedPhase(name, step, trees["trainable"]))
    if phases and not found:
        raise UserError(f"{files.path} holds no checkpoint: run ragjax.train on this run folder first.")
    return found
