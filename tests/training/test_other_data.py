"""Whole runs on data in other layouts, in other places, and with questions that are too long."""

import dataclasses
import json
import shutil

import pytest

from ragjax.config import EvaluateConfig
from ragjax.errors import UserError
from ragjax.evaluation import evaluate_runs
from ragjax.runs import open_run
from ragjax.training import run as run_module
from ragjax.training import train
from tests.tiny_runs import passages, questions, read_lines, refusal, tiny_world, write_data


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


def test_a_run_opens_from_any_directory_and_on_data_that_were_moved(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data", "bert", "llama"):
        shutil.copytree(world.folder / name, tmp_path / name)
    names = {"data": "data", "embedder": "bert", "generator": "./llama"}
    config = world.config("run", strategy="none", decode="none", **names)
    train(config)
    assert train(dataclasses.replace(config, data=f"{tmp_path}/data/", run_dir="./run")).n == 6  # the same run
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    opened = open_run("../run", with_generator=False)
    assert opened.config == dataclasses.replace(
        config, **{name: str(tmp_path / path) for name, path in names.items()}, run_dir=str(tmp_path / "run")
    )
    shutil.move(tmp_path / "data", elsewhere / "moved")
    with pytest.raises(UserError, match=rf"are not at {tmp_path}/data any more: give --data the folder"):
        open_run("../run", with_generator=False)
    assert open_run("../run", with_generator=False, data="moved").dataset.sha256 == opened.dataset.sha256
    found = evaluate_runs(EvaluateConfig(run_dir="../run", data="moved", decode="none"), {})
    assert found.n == 6
    (elsewhere / "moved" / "test.jsonl").write_text("")
    with pytest.raises(UserError, match="was made with a different --data"):
        open_run("../run", with_generator=False, data="moved")


def beir(folder):
    """The tiny data in BEIR's layout."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": each["id"], "title": each["title"], "text": each["text"]} for each in passages()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in corpus))
    with (folder / "queries.jsonl").open("w") as file:
        for split, asked in questions().items():
            lines = [f"{each['id']}\t{each['positive_ids'][0]}\t1\n" for each in asked]
            (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
            file.writelines(json.dumps({"_id": each["id"], "text": each["question"]}) + "\n" for each in asked)
    return folder


def test_data_without_answers_serve_retrieval_alone(world, tmp_path, capsys):
    data = str(beir(tmp_path / "beir"))
    changes = {"strategy": "embedder", "max_steps": 2}
    summary = train(world.config(tmp_path / "run", data=data, **changes))
    assert "(BEIR's layout, without answers)" in capsys.readouterr().out
    same = train(world.config(tmp_path / "answered", **changes))
    assert (summary.after["recall_at_5"], summary.n) == (same.after["recall_at_5"], 6)
    records = [read_lines(tmp_path / run / "predictions" / "test.after.jsonl") for run in ("run", "answered")]
    for line, other in zip(*records, strict=True):
        assert line["answer_in_context"] is line["em"] is line["contains"] is None
        assert other["answer_in_context"] in (0, 1)
        assert line["passages"] == other["passages"]
    for refused in ({"strategy": "joint"}, {"strategy": "none", "decode": "concat"}):
        message = refusal(world.config(tmp_path / "other", data=data, **refused))
        assert f"{data}/queries.jsonl: the question with the id" in message and "has no answers, which" in message
    with pytest.raises(UserError, match="has no answers, which --decode=concat needs"):
        evaluate_runs(EvaluateConfig(run_dir=str(tmp_path / "run"), decode="concat"), {})


@pytest.mark.parametrize("nothing", [..., None, []], ids=["missing", "null", "empty"])
def test_a_folder_of_ones_own_may_lack_answers_where_none_are_read(world, tmp_path, capsys, nothing):
    splits = questions()
    for asked in splits.values():
        for question in asked:
            del question["answers"]
            question |= {} if nothing is ... else {"answers": nothing}
    data = str(write_data(tmp_path / "data", passages(), splits))
    config = world.config(tmp_path / "run", data=data, strategy="embedder", max_steps=1)
    same = world.config(tmp_path / "answered", strategy="embedder", max_steps=1)
    assert train(config).after["recall_at_5"] == train(same).after["recall_at_5"]
    assert "(without answers)" in capsys.readouterr().out
    found = evaluate_runs(EvaluateConfig(run_dir=str(tmp_path / "run"), questions=f"{data}/dev.jsonl"), {})
    assert (found.n, found.results[0].scores["f1"]) == (4, None)
    with pytest.raises(UserError, match=r'dev.jsonl: the question with the id "dev-12" has no answers, which --decode'):
        evaluate_runs(EvaluateConfig(run_dir=str(tmp_path / "run"), questions=f"{data}/dev.jsonl", decode="concat"), {})


@pytest.mark.parametrize(("split", "asked"), [("train", 11), ("dev", 2), ("test", 5)])
def test_one_question_without_answers_is_named_where_they_are_read(world, tmp_path, split, asked):
    splits = questions()
    question = splits[split][asked]
    question["answers"] = []
    data = str(write_data(tmp_path / "data", passages(), splits))
    needs = "--decode=concat" if split == "test" else "the phase joint"
    sentence = f'{data}/{split}.jsonl: the question with the id "{question["id"]}" has no answers, which {needs} needs'
    assert sentence in refusal(world.config(tmp_path / "run", data=data))
    # Beyond what is read it is no fault.
    config = world.config(tmp_path / "run", data=data, eval_limit=5, dev_limit=2, max_steps=1)
    if split == "train":
        assert sentence in refusal(config)
    else:
        assert train(config).n == 5


def test_questions_of_two_splits_are_warned_of(world, tmp_path, capsys):
    splits = questions()
    splits["test"][1:3] = [splits["train"][4], splits["train"][2] | {"id": "renamed"}]
    data = str(write_data(tmp_path / "data", passages(), splits))
    config = world.config(tmp_path / "run", data=data, strategy="generator", max_steps=1, eval_limit=1)
    train(config)
    said = capsys.readouterr().err
    assert f'2 of the 6 test questions of {data} stand in train too, the first with the id "train-4": ' in said
    train(dataclasses.replace(config, strategy="none", run_dir=str(tmp_path / "none")))
    assert "stand in" not in capsys.readouterr().err  # nothing is learnt from them


@pytest.mark.parametrize(("split", "asked"), [("train", 3), ("dev", 2), ("test", 5)])
def test_a_question_that_is_too_long_is_named_before_anything_is_answered(world, tmp_path, monkeypatch, split, asked):
    splits = questions()
    question = splits[split][asked]
    question["question"] += " really" * 4000
    data = str(write_data(tmp_path / "data", passages(), splits))
    monkeypatch.setattr(run_module, "run_phases", None)  # would be called
    message = refusal(world.config(tmp_path / "run", data=data))
    assert message.startswith(f'the question with the id "{question["id"]}" is too long: ')


def test_a_long_question_that_is_not_read_is_no_fault(world, tmp_path):
    splits = questions()
    for split, asked in (("dev", 3), ("test", 1)):  # beyond --dev_limit and --eval_limit
        splits[split][asked]["question"] += " really" * 4000
    data = str(write_data(tmp_path / "data", passages(), splits))
    config = world.config(tmp_path / "run", data=data, strategy="generator", max_steps=1, eval_limit=1)
    assert train(config).n == 1
