"""Runs that a signal or a damaged checkpoint stops: the same command goes on, and ends with the same bits."""

import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from ragjax.checkpoints import Checkpoints
from ragjax.files import read_json
from ragjax.training import train
from ragjax.training.records import MetricsLog
from ragjax.training.state import make_optimizer
from tests.tiny_runs import read_lines, refusal, run_flags, tiny_world

STEPS = 5

# Runs `ragjax.train` and sends it SIGKILL at a moment that the first argument names, or SIGTERM ("term"). Where a line
# of a file is being appended, half of it stays: the kill came in the middle of the write.
KILLED = """
import os, runpy, signal, sys

moment, *sys.argv[1:] = sys.argv[1:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_in_the_middle_of_the_last_line_of(path):
    content = path.read_bytes()
    last = len(content.splitlines()[-1]) + 1
    path.write_bytes(content[: -(last // 2)])
    die()

def after(module, name, wanted, end):
    original = getattr(module, name)
    def patched(*arguments, **options):
        result = original(*arguments, **options)
        if wanted(*arguments):
            end(*arguments)
        return result
    setattr(module, name, patched)

import ragjax.checkpoints, ragjax.evaluation.predictions, ragjax.files, ragjax.training.records
name, number, *phase = moment.split()  # of the only phase, where none is named
number = int(number)
if name in ("before", "after"):
    def is_batch(path, *_):
        lines = (path.parent / (path.name + ".partial")).read_text().splitlines()
        return name in path.name and len(lines) == number
    after(ragjax.evaluation.predictions, "_append_partial", is_batch,
          lambda path, *_: die_in_the_middle_of_the_last_line_of(path.parent / (path.name + ".partial")))
elif name == "step":
    log = ragjax.training.records.MetricsLog
    after(log, "write", lambda self, line, *_: line["step"] == number and line["phase"] in (phase or [line["phase"]]),
          lambda self, *_: die_in_the_middle_of_the_last_line_of(self._path))
elif name == "scored":
    records = ragjax.files.KeyedRecords
    after(records, "add", lambda self, *_: self.lines == number,
          lambda self, *_: die_in_the_middle_of_the_last_line_of(self._path))
elif name == "term":
    log = ragjax.training.records.MetricsLog
    after(log, "write", lambda self, line, *_: line["step"] == number,
          lambda *_: os.kill(os.getpid(), signal.SIGTERM))
elif name == "saved":
    wait = ragjax.checkpoints.Checkpoints.wait
    def patched(self):
        written = self._writing
        wait(self)
        if written == number:
            die()
    ragjax.checkpoints.Checkpoints.wait = patched
elif name == "saving":
    rename = os.rename
    def commit(source, target, *arguments, **options):
        if os.path.basename(target) == str(number) and "orbax" in os.path.basename(source):
            die()  # all is written, but under the temporary name
        return rename(source, target, *arguments, **options)
    os.rename = commit
runpy.run_module("ragjax.train", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


def configuration(world, folder: Path, **changes):
    """Rank 0 is left to test_run; dropout makes the steps depend on random keys too, and some passages are cut."""
    values = {"max_steps": STEPS, "lora_dropout": 0.1, "max_passage_tokens": 24, "eval_limit": 4}
    return world.config(folder, **values | changes)


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = world.folder / "whole"
    train(configuration(world, folder))
    return folder


def final_trees(folder: Path, phase: str):
    checkpoints = Checkpoints(folder / "checkpoints" / phase)
    trainable = checkpoints.restore({"trainable": None})[1]["trainable"]
    optimizer = {model: make_optimizer(1.0, 0.0).init(tree) for model, tree in trainable.items()}
    step, trees, _ = checkpoints.restore({"trainable": trainable, "optimizer": optimizer})
    assert step == STEPS
    return trees


def assert_same_run(folder: Path, whole: Path):
    """Parameters, optimizer, metrics and predictions are the same bits; so is what does not depend on the clock."""
    phases = read_json(whole / "config.json")["phases"]
    for phase in phases:
        left, right = final_trees(folder, phase), final_trees(whole, phase)
        assert jax.tree.structure(left) == jax.tree.structure(right)
        for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_array_equal(one, other, strict=True)
    names = ["metrics.jsonl", "predictions/test.before.jsonl", "predictions/test.after.jsonl"]
    if "retriever" in phases:
        names.append("likelihoods.jsonl")
    for name in names:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    one, other = read_json(folder / "summary.json"), read_json(whole / "summary.json")
    assert one["retrieval"]["passages_cut"] == other["retrieval"]["passages_cut"] > 0
    for part in ("embedder", "generator", "search", "encode"):
        assert without_seconds(one["cost"][part]) == without_seconds(other["cost"][part]), part
        for phase in phases:
            costs = [summary["cost"]["phases"][phase][part] for summary in (one, other)]
            assert without_seconds(costs[0]) == without_seconds(costs[1]), (phase, part)
    assert not list((folder / "predictions").glob("*.partial"))


def without_seconds(cost: dict) -> dict:
    return {unit: value for unit, value in cost.items() if unit != "seconds"}


def killed(world, folder: Path, moment: str, **changes):
    done = world.command("-c", KILLED, moment, *run_flags(configuration(world, folder, **changes)))
    expected = 143 if moment.startswith("term") else -signal.SIGKILL
    assert done.returncode == expected, f"{moment}: {done.returncode}\n{done.stderr[-2000:]}"
    if expected == 143:
        assert done.stderr.endswith("\nstopped by SIGTERM; run the same command to continue\n")


@pytest.mark.slow
def test_a_run_killed_at_moments_of_every_kind_ends_like_one_that_was_not(world, whole):
    """One folder, killed again and again: each command takes up what the one before it left."""
    folder = world.folder / "killed"
    checkpoints, metrics = folder / "checkpoints" / "joint", folder / "metrics.jsonl"

    def steps_kept():
        return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())

    killed(world, folder, "before 2")  # in the second batch of the table before
    assert not (folder / "predictions" / "test.before.jsonl").exists()
    killed(world, folder, "step 1")  # before the first checkpoint
    assert (folder / "predictions" / "test.before.jsonl").exists()
    assert steps_kept() == []
    killed(world, folder, "step 3")  # between checkpoints
    assert steps_kept() == [2]
    assert len(metrics.read_bytes().splitlines()) == 4  # steps 0 to 2, and half of the third
    killed(world, folder, "term 3")  # the step is saved, though no checkpoint is due
    assert steps_kept() == [2, 3]
    assert [line["step"] for line in read_lines(metrics)] == [0, 1, 2, 3]
    killed(world, folder, "saving 4")  # in the middle of a checkpoint
    assert steps_kept() == [2, 3]
    assert [path for path in checkpoints.iterdir() if path.name.startswith("4.orbax")]
    killed(world, folder, "saved 4")  # right after it, before the next step has left its line
    assert steps_kept() == [3, 4]
    killed(world, folder, "after 1")  # in the first batch of the table after
    assert [line["step"] for line in read_lines(metrics)] == list(range(STEPS + 1))
    assert not (folder / "summary.json").exists()
    train(configuration(world, folder))
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_a_run_of_two_phases_killed_in_each_ends_like_one_that_was_not(world):
    """In the middle of the generator's phase, of the retriever's, and of a line of the likelihoods."""
    flags = {"strategy": "two_phase", "eval_limit": 1}
    whole, folder = world.folder / "whole-two-phase", world.folder / "killed-two-phase"
    train(configuration(world, whole, **flags))
    checkpoints, likelihoods = folder / "checkpoints", folder / "likelihoods.jsonl"
    lines = (whole / "likelihoods.jsonl").read_bytes().splitlines(keepends=True)

    def steps_kept(phase):
        return sorted(int(path.name) for path in (checkpoints / phase).glob("*") if path.name.isdigit())

    killed(world, folder, "step 3 generator", **flags)
    assert steps_kept("generator") == [2]
    assert not (checkpoints / "retriever").exists()
    killed(world, folder, "step 3 retriever", **flags)
    assert steps_kept("generator") == [4, 5]
    assert steps_kept("retriever") == [2]
    # More was scored than the checkpoint knows of: what comes behind it is forgotten and scored again.
    kept = likelihoods.read_bytes().splitlines(keepends=True)
    assert kept == lines[: len(kept)]
    killed(world, folder, f"scored {len(kept)}", **flags)
    assert steps_kept("retriever") == [2]
    assert not likelihoods.read_bytes().endswith(b"\n")
    train(configuration(world, folder, **flags))
    assert_same_run(folder, whole)
    # The newest checkpoint is damaged: metrics and likelihoods go back to the one before it, too.
    checkpoints = unfinished(whole, world.folder / "damaged-two-phase") / "retriever"
    for path in (checkpoints / str(STEPS)).rglob("*"):
        if path.is_file():
            path.unlink()
    train(configuration(world, world.folder / "damaged-two-phase", **flags))
    assert_same_run(world.folder / "damaged-two-phase", whole)


def unfinished(whole: Path, folder: Path) -> Path:
    """A copy of the run without its end, as if killed right after the last checkpoint. Returns the checkpoints."""
    shutil.copytree(whole, folder)
    (folder / "summary.json").unlink()
    for path in (folder / "predictions").glob("*after*"):
        path.unlink()
    return folder / "checkpoints"


def spoil(checkpoint: Path) -> None:
    """Flips the bits of a byte in the middle of its largest file."""
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(content)


# Orbax's other reads end after its event loop has closed, and say so in the background.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(world, whole, tmp_path, capsys):
    checkpoints = unfinished(whole, tmp_path / "run") / "joint"
    spoil(checkpoints / str(STEPS))
    train(configuration(world, tmp_path / "run"))
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "warning: The checkpoint" in line]
    assert f"warning: The checkpoint {checkpoints / str(STEPS)} " in said
    assert said.endswith(", so it is deleted and the one of step 4 is used.")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_where_no_checkpoint_is_whole_one_sentence_says_so_and_nothing_is_deleted(world, whole, tmp_path):
    checkpoints = unfinished(whole, tmp_path / "run") / "joint"
    for step in (4, STEPS):
        spoil(checkpoints / str(step))
    message = refusal(configuration(world, tmp_path / "run"))
    assert message.startswith(f"The checkpoint {checkpoints / str(STEPS)} ")
    assert message.endswith(f"no other is left in {checkpoints}: delete that folder to start from step 0.")
    assert Checkpoints(checkpoints).steps() == [4, STEPS]
    shutil.rmtree(checkpoints)  # as the message says
    train(configuration(world, tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole)


def test_ctrl_c_stops_a_phase_when_its_step_is_saved(world, whole, tmp_path, monkeypatch):
    """From Python, too: the exception comes after the step's measurement and checkpoint."""
    write = MetricsLog.write

    def interrupted(self, line, *timings):
        if line["step"] == 1 and not raised:
            raised.append(True)
            signal.raise_signal(signal.SIGINT)
        write(self, line, *timings)

    raised: list[bool] = []
    monkeypatch.setattr(MetricsLog, "write", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born without it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(configuration(world, tmp_path / "run"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert Checkpoints(tmp_path / "run" / "checkpoints" / "joint").steps() == [1]
    train(configuration(world, tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole)


def test_a_half_written_checkpoint_is_passed_over(world, whole, tmp_path):
    checkpoints = unfinished(whole, tmp_path / "run") / "joint"
    half = checkpoints / f"{STEPS}.orbax-checkpoint-tmp"
    (checkpoints / str(STEPS)).rename(half)
    files = [path for path in half.rglob("*") if path.is_file()]
    files[0].write_bytes(files[0].read_bytes()[:1])
    train(configuration(world, tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole)


def test_the_driver_kills_only_at_its_moment(world, whole):
    """Without its moment the driver is the plain command; on a finished run that takes no time."""
    done = world.command("-c", KILLED, "step 99", *run_flags(configuration(world, whole)))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "evaluation (apart)" in done.stdout
