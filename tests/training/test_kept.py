"""Which state of a phase is kept: the rule by hand, and whole phases whose dev figures are known."""

import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ragjax.checkpoints import Checkpoints
from ragjax.runs import RunFolder, open_run, prepare, read_phases
from ragjax.training import train
from ragjax.training.dev import DevMeter, Measured
from ragjax.training.health import Found
from ragjax.training.kept import criterion, finds_less, is_better
from ragjax.training.loop import Trainer, train_phase
from ragjax.training.strategies import STRATEGIES
from tests.tiny_runs import flat, passages, questions, read_lines, tiny_world, write_data

FIGURES = {"loss": 3.0, "nll_per_answer": 2.0, "recall_at_5": 0.5, "mrr_at_10": 0.25, "top_k_agreement": 1.0}


def test_each_phase_is_judged_by_what_it_stands_for():
    (labels,), (joint,), (tuned, retriever) = (STRATEGIES[name] for name in ("embedder", "joint", "two_phase"))
    assert criterion(labels, FIGURES) == {"recall_at_5": 0.5, "mrr_at_10": 0.25}
    for phase in (joint, tuned, retriever):
        assert criterion(phase, FIGURES) == {"nll_per_answer": 2.0}
    assert criterion(labels, {"loss": 3.0}) == {}  # no dev question is labelled
    assert criterion(joint, {}) == {}  # there are no dev questions


@pytest.mark.parametrize(
    ("now", "best", "expected"),
    [
        ({"nll_per_answer": 1.9}, {"nll_per_answer": 2.0}, True),
        ({"nll_per_answer": 2.0}, {"nll_per_answer": 2.0}, False),  # the earlier state
        ({"nll_per_answer": math.nan}, {"nll_per_answer": 2.0}, False),
        ({"recall_at_5": 0.6, "mrr_at_10": 0.1}, {"recall_at_5": 0.5, "mrr_at_10": 0.9}, True),
        ({"recall_at_5": 0.5, "mrr_at_10": 0.3}, {"recall_at_5": 0.5, "mrr_at_10": 0.2}, True),
        ({"recall_at_5": 0.5, "mrr_at_10": 0.2}, {"recall_at_5": 0.5, "mrr_at_10": 0.2}, False),
        ({"recall_at_5": 0.4, "mrr_at_10": 0.9}, {"recall_at_5": 0.5, "mrr_at_10": 0.2}, False),
    ],
)
def test_what_is_better(now, best, expected):
    assert is_better(now, best) is expected


@pytest.mark.parametrize(
    ("start", "now", "expected"),
    [
        ([1, 1, 0, 0], [1, 1, 0, 0], False),
        ([1, 1, 0, 0], [1, 1, 1, 0], False),
        # One of four falls: the mean is -1/4, its standard error sqrt(3/16 / 3) / 1 = 1/4.
        ([1, 1, 0, 0], [0, 1, 0, 0], False),
        # Two of four: -1/2, and sqrt(1/3 / 4) = 0.289.
        ([1, 1, 0, 0], [0, 0, 0, 0], True),
        ([1, 1], [0, 0], True),  # no spread at all
        ([], [], False),
        ([1], [0], False),  # one question has no standard error
    ],
)
def test_a_fall_of_recall_beyond_its_standard_error(start, now, expected):
    health = SimpleNamespace(start=Found({}, np.array(start, float)))
    assert finds_less(Found({}, np.array(now, float)), health) is expected


@pytest.mark.parametrize("fall", [1.0, 0.5, 1 / 3])
def test_one_question_that_finds_less_is_no_fall_however_many_are_asked(fall):
    """Its fall, d / n on the mean, is exactly one standard error: sqrt((d^2 - d^2 / n) / (n - 1) / n) = d / n."""
    for count in range(2, 1001):
        start = np.full(count, 1.0)
        now = start.copy()
        now[count // 2] -= fall
        assert not finds_less(Found({}, now), SimpleNamespace(start=Found({}, start))), count


# --- whole phases


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(scope="module")
def prepared(world):
    return prepare(world.config("unused"))


def trained_with(prepared, folder, strategy="generator", **changes):
    """(the result of the strategy's first phase, its lines of metrics, its folder)."""
    config = dataclasses.replace(prepared.config, keep="best", dev_every=1, **changes)
    files = RunFolder(folder)
    (phase, *_) = STRATEGIES[strategy]
    return (
        train_phase(dataclasses.replace(prepared, config=config, files=files), phase),
        read_lines(files.metrics_file),
        files,
    )


def script(monkeypatch, losses, recalls=None) -> None:
    """Measurements with these dev losses and, where they are given, these Recall@5 of each question, step by step."""
    measure = DevMeter.measure

    def scripted_measure(self, step, *arguments):
        measured = measure(self, step, *arguments)
        found = measured.found
        if recalls is not None:
            found = dataclasses.replace(found, recalls=np.array(recalls[step], float))
            if step == 0:
                self.health.start = found
        return Measured(measured.figures | {"nll_per_answer": losses[step]}, found)

    monkeypatch.setattr(DevMeter, "measure", scripted_measure)


@pytest.fixture
def scripted(monkeypatch):
    """Dev losses that fall, rise, fall to the lowest after step 3 (and again after step 5), and rise."""
    script(monkeypatch, [5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 4.0])


def test_the_state_with_the_lowest_dev_loss_is_kept(prepared, tmp_path, scripted):
    result, lines, files = trained_with(prepared, tmp_path / "best", generator_lr=0.3, max_steps=6)
    assert [line["step"] for line in lines if "dev_nll_per_answer" in line] == list(range(7))
    best = 3
    assert result.kept.step == best and result.kept.figures == {"nll_per_answer": 3.0}
    assert result.kept.start == {"nll_per_answer": 5.0}
    # The same training, stopped there.
    stopped = dataclasses.replace(prepared.config, keep="last", dev_every=1, generator_lr=0.3, max_steps=6)
    run = dataclasses.replace(prepared, config=stopped, files=RunFolder(tmp_path / "stopped"))
    (phase,) = STRATEGIES["generator"]
    expected = train_phase(run, phase, stop_at=best).trained
    jax.tree.map(np.testing.assert_array_equal, result.trained, expected)
    # And that is what opens.
    (opened,) = read_phases(files, ["generator"])
    assert opened.step == best
    jax.tree.map(np.testing.assert_array_equal, opened.trained, expected)


def test_a_lower_loss_does_not_buy_a_worse_retrieval(prepared, tmp_path, monkeypatch):
    """Step 1 finds one question's passage less, within its error; step 2 has the lowest loss and finds none."""
    recalls = [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    script(monkeypatch, [5.0, 4.0, 2.0, 4.5], recalls)
    result, _, _ = trained_with(prepared, tmp_path / "joint", "joint", max_steps=3)
    assert result.kept.step == 1


def test_a_start_that_was_never_beaten_is_kept(world, prepared, tmp_path, capsys, monkeypatch):
    script(monkeypatch, [5.0, 6.0, 5.0, 7.0])
    config = world.config(tmp_path / "run", strategy="generator", keep="best", max_steps=3, dev_every=1)
    summary = train(config)
    kept = summary.kept["generator"]
    assert kept["step"] == 0 and kept["figures"] == kept["start"]
    assert "no measured state is better than the start" in capsys.readouterr().out
    assert summary.after == summary.before
    run = open_run(tmp_path / "run")
    for name, leaf in flat(run.generator.lora).items():
        np.testing.assert_array_equal(leaf, flat(prepared.generator.lora)[name])


def test_labels_are_judged_by_what_is_found(prepared, tmp_path):
    result, lines, _ = trained_with(prepared, tmp_path / "run", "embedder", embedder_lr=0.1, max_steps=4)
    scores = {line["step"]: (line["dev_recall_at_5"], line["dev_mrr_at_10"]) for line in lines}
    assert len(set(scores.values())) > 1
    best = max(scores, key=lambda step: (*scores[step], -step))
    assert result.kept.step == best
    assert tuple(result.kept.figures.values()) == scores[best]


def test_last_keeps_the_last(prepared, tmp_path, scripted):
    result, _, files = trained_with(prepared, tmp_path / "best", generator_lr=0.3, max_steps=6)
    config = dataclasses.replace(prepared.config, keep="last", dev_every=1, generator_lr=0.3, max_steps=6)
    run = dataclasses.replace(prepared, config=config, files=RunFolder(tmp_path / "last"))
    (phase,) = STRATEGIES["generator"]
    last = train_phase(run, phase)
    assert last.kept is None and not (tmp_path / "last" / "best").exists()
    assert any((flat(last.trained)[name] != leaf).any() for name, leaf in flat(result.trained).items())
    (opened,) = read_phases(run.files, ["generator"])
    assert opened.step == 6


def test_without_dev_questions_the_last_state_is_kept_and_that_is_said(world, tmp_path, capsys):
    splits = questions()
    del splits["dev"]
    data = write_data(tmp_path / "data", passages(), splits)
    config = world.config(tmp_path / "run", strategy="generator", keep="best", data=str(data), max_steps=1)
    summary = train(config)
    assert summary.kept == {"generator": None}
    assert not (tmp_path / "run" / "best").exists()
    assert "the last state is kept, because no dev questions tell which is the best" in capsys.readouterr().out


def test_a_phase_is_measured_at_least_eight_times(prepared, tmp_path):
    config = dataclasses.replace(prepared.config, keep="best", dev_every=None, max_steps=17, ranking_batch_size=2)
    run = dataclasses.replace(prepared, config=config, files=RunFolder(tmp_path))
    (phase,) = STRATEGIES["embedder"]
    train_phase(run, phase)
    measured = [line["step"] for line in read_lines(tmp_path / "metrics.jsonl") if "dev_recall_at_5" in line]
    assert measured == [0, 3, 6, 9, 12, 15, 17]


@pytest.mark.parametrize("keep", [1, 2])
def test_each_checkpoint_has_its_best_state_beside_it(prepared, tmp_path, monkeypatch, keep):
    """Every state is better than the one before; stopped after the best state of step 4, before its checkpoint."""
    script(monkeypatch, [9.0 - step for step in range(7)])
    save = Trainer._save

    def stopping(self):
        if self.step == 4:
            self._wait()  # the process stays, and goes on writing
            raise KeyboardInterrupt
        save(self)

    monkeypatch.setattr(Trainer, "_save", stopping)
    with pytest.raises(KeyboardInterrupt):
        trained_with(prepared, tmp_path, max_steps=6, keep_checkpoints=keep)
    files = RunFolder(tmp_path)
    checkpoints, best = (Checkpoints(part("generator")) for part in (files.checkpoints, files.best_checkpoints))
    assert checkpoints.steps() == [1, 2, 3][-keep:]
    for step in checkpoints.steps():
        assert checkpoints.restore({}, step)[2]["kept"]["step"] == step
        assert step in best.steps()
    assert best.steps()[-1] == 4


@pytest.mark.parametrize("killed_after", [1, 3, 4])
def test_a_killed_phase_keeps_the_same_state(prepared, tmp_path, monkeypatch, scripted, killed_after):
    """Killed between a measurement and the checkpoint of that step, or later: the rerun ends with the same files."""
    flags = {"generator_lr": 0.3, "max_steps": 6, "checkpoint_every": 2}
    whole, lines, files = trained_with(prepared, tmp_path / "whole", **flags)
    save = Trainer._save

    def killing(self):
        if self.step == killed_after and not done:
            done.append(True)
            self._wait()  # the process stays, and goes on writing
            raise KeyboardInterrupt
        save(self)

    done: list[bool] = []
    monkeypatch.setattr(Trainer, "_save", killing)
    with pytest.raises(KeyboardInterrupt):
        trained_with(prepared, tmp_path / "killed", **flags)
    again, its_lines, its_files = trained_with(prepared, tmp_path / "killed", **flags)
    assert its_lines == lines and again.kept == whole.kept
    jax.tree.map(np.testing.assert_array_equal, again.trained, whole.trained)
    for one, other in zip(read_phases(files, ["generator"]), read_phases(its_files, ["generator"]), strict=True):
        assert one.step == other.step
        jax.tree.map(np.testing.assert_array_equal, one.trained, other.trained)
    assert json.dumps(whole.kept.as_dict()) == json.dumps(again.kept.as_dict())


def test_a_best_state_that_a_kill_has_left_unwritten_is_written_from_its_checkpoint(prepared, tmp_path, scripted):
    """Both are written beside the next step, and either may be whole first."""
    changes = {"generator_lr": 0.3, "max_steps": 6}
    config = dataclasses.replace(prepared.config, keep="best", dev_every=1, **changes)
    (phase,) = STRATEGIES["generator"]
    train_phase(dataclasses.replace(prepared, config=config, files=RunFolder(tmp_path / "run")), phase, stop_at=3)
    shutil.rmtree(RunFolder(tmp_path / "run").best_checkpoints("generator") / "3")
    again, *_ = trained_with(prepared, tmp_path / "run", **changes)
    whole, *_ = trained_with(prepared, tmp_path / "whole", **changes)
    assert again.kept.step == whole.kept.step == 3
    jax.tree.map(np.testing.assert_array_equal, again.trained, whole.trained)
