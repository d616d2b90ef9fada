"""Paths as users write them: ~, other spellings, other directories."""

import os

import pytest

from ragjax.config import EvaluateConfig, RunConfig
from ragjax.errors import UserError
from ragjax.fields import changed_flags, differing_fields
from ragjax.paths import expanded, is_same, located
from ragjax.runs import RunFolder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home folder, with data/ and model.gguf in it; it is the current directory too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "model.gguf").touch()
    (tmp_path / "minilm").touch()  # a file that is no model
    return tmp_path


def test_home_is_spelled_out(home):
    assert expanded("~/data") == f"{home}/data"
    assert expanded("data/~x") == "data/~x"
    with pytest.raises(UserError, match="~nobody_here/x begins at a home folder that is not known"):
        expanded("~nobody_here/x")


def test_every_path_of_a_configuration_begins_at_home(home):
    names = ("data", "embedder", "generator", "run_dir", "embedder_run", "generator_run")
    config = RunConfig(strategy="independent", **dict.fromkeys(names, "~/x"))
    assert {getattr(config, name) for name in names} == {f"{home}/x"}
    names = ("run_dir", "embedder", "generator", "data", "questions", "paired_with", "out")
    config = EvaluateConfig(**dict.fromkeys(names, "~/x"))
    assert {getattr(config, name) for name in names} == {f"{home}/x"}
    assert RunFolder("~/x").path == home / "x"


def test_local_paths_are_absolute_and_names_stay_names(home):
    config = RunConfig(data="data", generator="./model.gguf", embedder="minilm", run_dir="runs/x").located()
    assert (config.data, config.generator) == (f"{home}/data", f"{home}/model.gguf")
    assert (config.embedder, config.run_dir) == ("minilm", f"{home}/runs/x")
    assert RunConfig().located() == RunConfig()
    assert located("owner/model") == "owner/model"


@pytest.mark.parametrize("spelling", ["data", "./data", "data/", "~/data", "link", "runs/../data"])
def test_spellings_of_one_path_are_one_configuration(home, spelling):
    os.symlink(home / "data", home / "link")
    recorded = {**vars(RunConfig(data="data", run_dir="run").located())}
    assert differing_fields(recorded, RunConfig(data=spelling, run_dir="./run/")) == []
    assert differing_fields(recorded, RunConfig(data="other", run_dir="run")) == ["data"]
    assert differing_fields(recorded | {"data": "sample"}, RunConfig(run_dir="run")) == []


def test_places_are_compared_where_they_are(home):
    assert is_same("data", f"{home}/data")
    assert not is_same("data", "minilm")


def test_changed_flags_can_be_pasted():
    config = RunConfig(data="my data", top_k=3, scan_layers=False, lora_targets="q_proj,v_proj")
    assert changed_flags(config, RunConfig()) == [
        "--data='my data'",
        "--top_k=3",
        "--lora_targets=q_proj,v_proj",
        "--scan_layers=False",
    ]
