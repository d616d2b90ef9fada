"""The commands as a user meets them: help, version, and what they print on a finished run."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

import ragjax
from ragjax.config import RunConfig
from ragjax.errors import UserError
from ragjax.evaluation import evaluate_run
from ragjax.pipeline import ask, open_run
from ragjax.training import run
from tests.tiny_runs import PLACES, questions, read_lines, tiny_world

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = ROOT / "docs" / "defaults.md"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(scope="module")
def finished(world) -> Path:
    folder = world.folder / "commands-run"
    run(world.config(folder, max_steps=2, eval_limit=2))
    return folder


def help_of(world, command: str) -> str:
    done = world.command("-m", f"ragjax.{command}", "--help")
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_help_of_train_explains_every_field_and_no_other_library(world):
    text = help_of(world, "train")
    assert "Fine-tunes a retrieval-augmented generation pipeline" in text
    words = "".join(text.split())  # lines are also broken behind hyphens
    for field in dataclasses.fields(RunConfig):
        shown = f"--[no]{field.name}:" if isinstance(field.default, bool) else f"--{field.name}:"
        assert shown in words, field.name
        assert "".join(field.metadata["help"].split()) in words, field.name
    assert "<none|generator|joint|embedder|independent|two_phase|auto>" in words
    assert set(re.findall(r"^  --(?:\[no\])?(\w+):", text, re.MULTILINE)) == {
        field.name for field in dataclasses.fields(RunConfig)
    }


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("evaluate", {"run_dir", "split", "eval_limit", "eval_batch_size", "predictions"}),
        ("ask", {"run_dir", "top_k"}),
        ("export", {"run_dir", "out", "merge", "max_shard_gb"}),
    ],
)
def test_the_help_of_other_commands_lists_their_flags(world, command, flags):
    text = help_of(world, command)
    assert f"python -m ragjax.{command}" in text
    assert set(re.findall(r"^  --(?:\[no\])?(\w+):", text, re.MULTILINE)) == flags


@pytest.mark.parametrize("command", ["train", "evaluate", "ask", "export"])
def test_version_is_printed(world, command):
    done = world.command("-m", f"ragjax.{command}", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ragjax {ragjax.__version__}\n", "")


def test_arguments_that_are_no_flags_are_refused(world):
    done = world.command("-m", "ragjax.train", "joint")
    assert done.returncode == 1
    assert "takes flags only, not 'joint'" in done.stderr


def test_evaluate_prints_scores_and_writes_a_line_for_each_question(world, finished):
    done = world.command("-m", "ragjax.evaluate", f"--run_dir={finished}", "--split=dev", "--eval_batch_size=2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{finished} at step 2, 4 dev questions" in done.stdout
    for word in ("metric", "em", "f1", "contains", "recall_at_5", "hit_at_5", "TFLOPs"):
        assert word in done.stdout
    records = read_lines(finished / "predictions" / "dev.after.jsonl")
    assert [record["id"] for record in records] == [question["id"] for question in questions()["dev"]]


def test_evaluation_repeats_what_training_found(finished, tmp_path, capsys):
    """From the checkpoint, into another file: the table after training, line for line."""
    evaluate_run(str(finished), "test", 2, 2, str(tmp_path / "again.jsonl"))
    assert (tmp_path / "again.jsonl").read_bytes() == (finished / "predictions" / "test.after.jsonl").read_bytes()
    assert "2 test questions" in capsys.readouterr().out


def test_a_predictions_file_of_other_questions_is_refused(finished):
    path = finished / "predictions" / "test.after.jsonl"
    before = path.read_bytes()
    with pytest.raises(UserError, match="holds predictions for 2 other questions") as caught:
        evaluate_run(str(finished), "test", 3, 2, "")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_an_unfinished_run_is_not_evaluated_into_its_own_folder(world, tmp_path):
    """Else training would later take the file for its own table after the last step."""
    config = world.config(tmp_path / "run", max_steps=2, eval_limit=1)
    run(config)
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "predictions" / "test.after.jsonl").unlink()
    with pytest.raises(UserError, match="is not finished"):
        evaluate_run(str(tmp_path / "run"), "test", 1, 2, "")
    assert not (tmp_path / "run" / "predictions" / "test.after.jsonl").exists()
    evaluate_run(str(tmp_path / "run"), "test", 1, 2, str(tmp_path / "today.jsonl"))
    assert len(read_lines(tmp_path / "today.jsonl")) == 1


def test_a_split_without_questions_is_refused(finished, monkeypatch):
    import ragjax.evaluation.runner as runner

    opened = open_run(finished)
    without = dataclasses.replace(opened, dataset=dataclasses.replace(opened.dataset, dev=[]))
    monkeypatch.setattr(runner, "open_run", lambda _: without)
    with pytest.raises(UserError, match="has no dev questions"):
        evaluate_run(str(finished), "dev", 0, 2, "other.jsonl")


def test_ask_shows_the_answer_and_its_passages(world, finished):
    done = world.command("-m", "ragjax.ask", f"--run_dir={finished}", "Which number has the town", "Arby?")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Unable to initialize backend" not in done.stderr  # nor other lines that libraries log as INFO
    answer, *shown = [line for line in done.stdout.splitlines() if line]
    assert re.search(r"\(probability [01]\.\d{3}\)$", answer)
    places = [re.fullmatch(r"(\d)\. p\(z\|x\) = (0\.\d{3}|1\.000)  \[p(\d+)\]  (\w+): .*", line) for line in shown]
    assert [int(match[1]) for match in places] == [1, 2, 3]
    assert all(PLACES[int(match[3])] == match[4] for match in places)
    shares = [float(match[2]) for match in places]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=2e-3)


def test_an_answer_has_the_probability_of_its_tokens(finished):
    opened = open_run(finished)
    question = questions()["test"][0]["question"]
    answer = ask(opened, question, 2)
    assert len(answer.passages) == len(answer.probabilities) == 2
    assert answer.probabilities.sum() == pytest.approx(1)
    generator, rows = opened.pipeline.generator, [int(passage.id[1:]) for passage in answer.passages]
    prompt = opened.pipeline.concatenated_prompt(question, rows, opened.config.max_new_tokens)
    text = [*prompt, *generator.answer_ids(answer.text)]
    logits = np.asarray(generator.logits(np.array([text]))[0], np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares = weights / weights.sum(axis=-1, keepdims=True)
    wanted = np.prod([shares[place - 1, text[place]] for place in range(len(prompt), len(text))])
    assert answer.probability == pytest.approx(wanted, rel=1e-3)


def test_a_question_is_needed(world, finished):
    done = world.command("-m", "ragjax.ask", f"--run_dir={finished}")
    assert done.returncode == 1
    assert "error: Ask something" in done.stderr


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="reads a file that only a checkout has")
def test_every_default_stands_in_the_table():
    """docs/defaults.md: `| --flag | default | why |`, with the default as it is now."""
    rows = {}
    for line in DEFAULTS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if match := re.fullmatch(r"`?--(\w+)`?", cells[0]):
            assert match[1] not in rows, f"--{match[1]} stands there twice"
            rows[match[1]] = cells[1:]
    assert rows.keys() == {field.name for field in dataclasses.fields(RunConfig)}
    for field in dataclasses.fields(RunConfig):
        default = rows[field.name][0]
        assert same_value(default.strip('`" '), field.default), f"--{field.name}: {default} is {field.default!r}"


def same_value(shown: str, value) -> bool:
    """Whether the table's text says the value: numbers in any spelling, true/false, and words for what is left open."""
    if value is None:
        return shown.lower() in {"empty", "none", "the phase's"}
    if isinstance(value, bool):
        return shown.lower() == str(value).lower()
    if isinstance(value, int | float):
        try:
            return float(shown) == value
        except ValueError:
            return False
    return shown == value or (value == "" and shown.lower() in {"", "empty", "none", "runs/strategy"})
