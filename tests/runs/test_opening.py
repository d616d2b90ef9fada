"""Preparing a run and opening one: what is loaded, what is said, and what an open run gives."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

import ragjax
from ragjax.data.dataset import load_dataset
from ragjax.data.passages import PassageList
from ragjax.errors import UserError
from ragjax.pretrained import load_embedder, load_generator
from ragjax.runs import RunFolder, ask, prepare
from tests.tiny_exports import nudged, random_adapters, write_run
from tests.tiny_runs import changed, questions, tiny_world

TARGETS = ("q_proj", "v_proj", "up_proj")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(scope="module")
def trained(world):
    """What the checkpoint of the run below holds."""
    generator = load_generator(world.generator)
    return {
        "embedder": {"params": nudged(load_embedder(world.embedder).params)},
        "generator": {"lora": random_adapters(generator.params, 4, TARGETS)},
    }


@pytest.fixture(scope="module")
def opened(world, trained):
    """From a folder that was moved since."""
    folder = world.folder / "opened"
    config = world.config("where/it/was", lora_targets=",".join(TARGETS), decode="rag_token")
    write_run(folder, config, {"joint": trained}, finished=False)
    return ragjax.open_run(folder)


def test_an_open_run_is_the_one_that_was_trained(opened, trained, world):
    assert opened.folder == world.folder / "opened"
    assert (opened.config.run_dir, opened.step) == (os.path.abspath("where/it/was"), 7)
    assert changed(opened.embedder.params, trained["embedder"]["params"]) == set()
    assert changed(opened.generator.lora, trained["generator"]["lora"]) == set()
    # What the checkpoint does not hold is the source's.
    assert changed(opened.generator.params, load_generator(world.generator).params) == set()
    assert opened.unfinished() == f"{opened.folder} is not finished: its state of step 7 is used."
    assert {path.name for path in opened.folder.iterdir()} == {"config.json", "checkpoints"}  # nothing was written


def test_an_open_run_retrieves_with_the_trained_embedder(opened, world):
    """Over the vectors that the untrained one gave the passages."""
    asked = [question["question"] for question in questions()["test"]]
    corpus = load_dataset(world.data).passages
    passages = load_embedder(world.embedder).encode([passage.embedder_text for passage in corpus])
    scores = opened.embedder.encode(asked).astype(np.float64) @ passages.T.astype(np.float64)
    found = opened.retrieve(asked, 4)
    np.testing.assert_allclose(found.scores, -np.sort(-scores)[:, :4], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(scores, found.passage_rows, axis=1), found.scores, atol=1e-6)


def test_an_open_run_answers_as_its_configuration_says(opened):
    question = questions()["test"][0]["question"]
    answer = opened.ask(question)
    assert len(answer.passages) == opened.config.top_k
    same, other = (
        ask(opened.pipeline, question, dataclasses.replace(opened.config, decode=decoder))
        for decoder in ("rag_token", "concat")
    )
    assert (answer.text, answer.probability) == (same.text, same.probability)
    assert answer.probability != other.probability


def test_a_run_of_an_older_version_opens(opened, world):
    """Its config.json has text where there are lists now."""
    folder = world.folder / "older"
    shutil.copytree(opened.folder, folder)
    content = json.loads((folder / "config.json").read_text())
    assert content["flags"]["lora_targets"] == list(TARGETS)
    content["flags"]["lora_targets"] = ",".join(TARGETS)
    (folder / "config.json").write_text(json.dumps(content))
    older = ragjax.open_run(folder)
    assert older.config == opened.config
    assert changed(older.generator.lora, opened.generator.lora) == set()
    RunFolder(folder).check_flags(opened.config)  # and continues
    with pytest.raises(UserError, match=r"--lora_targets=q_proj,v_proj,up_proj \(now q_proj\)"):
        RunFolder(folder).check_flags(dataclasses.replace(opened.config, lora_targets="q_proj"))


def test_preparing_says_what_is_asked_for_and_writes_nothing(world, tmp_path, capsys):
    config = world.config(tmp_path / "run")
    run = prepare(config, announced=("data", "generator"))
    data, generator = capsys.readouterr().out.splitlines()
    assert data.startswith("data: data, 30 passages, 12 / 4 / 6 questions, sha256 ")
    assert generator == f"generator: {run.generator.describe()}"
    assert (run.config, run.folder, run.step) == (config, tmp_path / "run", 0)
    assert not run.folder.exists()
    prepare(config)
    assert capsys.readouterr().out == ""


def test_data_that_are_loaded_already_are_used(world, tmp_path):
    dataset = load_dataset(world.data)
    fewer = dataclasses.replace(dataset, passages=PassageList(list(dataset.passages)[:20]))
    run = prepare(world.config(tmp_path / "run"), fewer)
    assert run.dataset is fewer
    assert len(run.pipeline.store) == 20


def test_inputs_are_refused_before_the_corpus_is_encoded(world, tmp_path, monkeypatch):
    monkeypatch.setenv("RAGJAX_CACHE", str(tmp_path / "cache"))
    seen = []

    def refuse(inputs):
        seen.append(inputs)
        raise UserError("not these.")

    with pytest.raises(UserError, match="not these"):
        prepare(world.config(tmp_path / "run"), check=refuse)
    assert {name: len(entry["sha256"]) for name, entry in seen[0].items()} == {
        "embedder": 64,
        "generator": 64,
        "data": 64,
    }
    assert not (tmp_path / "cache").exists()
