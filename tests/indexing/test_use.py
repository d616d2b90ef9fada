"""Runs that search an index of a folder: the same as over all vectors where it finds all, and refused where it is not
theirs.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from ragjax.config import EvaluateConfig, IndexConfig, RunConfig
from ragjax.errors import UserError
from ragjax.evaluation import evaluate_runs
from ragjax.indexing import make_index
from ragjax.runs import open_run, prepare
from ragjax.training import train
from tests.tiny import write_tiny_bert
from tests.tiny_runs import read_lines, tiny_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


def index_of(world, name, **changes) -> Path:
    folder = world.folder / name
    values = {"index": "IVF3,Flat", "nprobe": 3, "data": str(world.data), "embedder": str(world.embedder)}
    make_index(IndexConfig(index_dir=str(folder), **values | changes))
    return folder


@pytest.fixture(scope="module")
def index_dir(world) -> Path:
    """All lists are looked at, so it finds what exact search finds."""
    return index_of(world, "index")


@pytest.fixture(scope="module")
def config(world, index_dir) -> RunConfig:
    return world.config(
        world.folder / "indexed", strategy="embedder", index_dir=str(index_dir), max_steps=2, decode="none", dev_every=0
    )


@pytest.fixture(scope="module")
def finished(config):
    return train(config)


def without_costs(lines):
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def test_a_run_over_the_index_is_that_over_all_vectors(world, config, finished):
    exact = train(dataclasses.replace(config, index_dir="", run_dir=str(world.folder / "exact")))
    folders = Path(config.run_dir), world.folder / "exact"
    for name in ("metrics.jsonl", "predictions/test.before.jsonl", "predictions/test.after.jsonl"):
        one, other = (without_costs(read_lines(folder / name)) for folder in folders)
        assert one == other
    assert (finished.before, finished.after) == (exact.before, exact.after)
    assert finished.retrieval["index"]["type"] == "IVF3,Flat" and exact.retrieval["index"]["type"] == "Flat"
    assert (
        finished.cost["encode"]["tokens"] == exact.cost["encode"]["tokens"] > 0
    )  # in full, though it was built before


def test_config_json_names_the_index(config, finished, index_dir):
    record = json.loads((Path(config.run_dir) / "config.json").read_text())
    assert record["flags"]["index_dir"] == str(index_dir)
    assert record["inputs"]["index_dir"]["source"] == "IVF3,Flat" and len(record["inputs"]["index_dir"]["sha256"]) == 64
    assert (record["index"]["nprobe"], record["index"]["lists"]) == (3, 3)


def test_a_run_opens_with_its_index_or_another(world, config, finished, index_dir):
    moved = world.folder / "moved"
    index_dir.rename(moved)
    try:
        with pytest.raises(UserError, match=r"--index_dir=.*/index holds no index"):
            open_run(config.run_dir, with_generator=False)
        opened = open_run(config.run_dir, with_generator=False, search={"index_dir": str(moved), "nprobe": 1})
        assert opened.pipeline.retriever.index.nprobe == 1
    finally:
        moved.rename(index_dir)
    assert open_run(config.run_dir, with_generator=False).pipeline.retriever.index.nprobe == 3
    flat = index_of(world, "flat", index="Flat", nprobe=0, vector_dtype="bfloat16")
    opened = open_run(config.run_dir, with_generator=False, search={"index_dir": str(flat)})
    assert opened.pipeline.retriever.index.describe()["type"] == "Flat"


def test_another_index_in_the_same_place_is_refused(config, finished, index_dir):
    record = json.loads((index_dir / "index.json").read_text())
    (index_dir / "index.json").write_text(json.dumps({**record, "factory": "IVF9,Flat"}))
    try:
        with pytest.raises(UserError, match=r"was made with a different --index_dir \(sha256 \w{12}, now \w{12}\)"):
            open_run(config.run_dir, with_generator=False)
    finally:
        (index_dir / "index.json").write_text(json.dumps(record))


def test_evaluation_over_another_index_has_its_own_file(config, finished, index_dir):
    asked = EvaluateConfig(run_dir=config.run_dir, decode=("none",))
    found = evaluate_runs(asked, {"nprobe": 1})
    assert found.results[0].path.name == "test.none.k3.index-nprobe1.jsonl"
    again = evaluate_runs(asked, {"nprobe": 1})
    assert again.results[0].predictions == found.results[0].predictions
    as_trained = evaluate_runs(asked, {})
    assert as_trained.results[0].path.name == "test.after.jsonl"  # what training has found is found again


def test_untrained_models_over_an_index(world, index_dir, tmp_path):
    asked = {"embedder": str(world.embedder), "data": str(world.data), "decode": ("none",), "top_k": (3,)}
    plain, indexed = (
        evaluate_runs(EvaluateConfig(**asked, out=str(tmp_path / name)), {"index_dir": each})
        for name, each in (("plain", ""), ("indexed", str(index_dir)))
    )
    assert indexed.results[0].predictions == plain.results[0].predictions
    assert indexed.run.pipeline.retriever.index.describe()["type"] == "IVF3,Flat"


def test_vectors_of_a_folder_are_those_of_the_cache(config, index_dir):
    rows = np.arange(7)
    indexed, cached = (
        prepare(dataclasses.replace(config, index_dir=each), with_generator=False).pipeline.retriever.vectors
        for each in (str(index_dir), "")
    )
    np.testing.assert_array_equal(indexed.vectors_of(rows), cached.vectors_of(rows))


def test_what_does_not_fit_is_one_sentence(world, config, tmp_path):
    other = write_tiny_bert(tmp_path / "bert", seed=9)
    with pytest.raises(UserError, match="was made with another embedder"):
        prepare(dataclasses.replace(config, embedder=str(other)), with_generator=False)
    with pytest.raises(UserError, match="--nprobe=4 goes with --index_dir"):
        prepare(dataclasses.replace(config, index_dir="", nprobe=4), with_generator=False)
    with pytest.raises(UserError, match="holds no index"):
        prepare(dataclasses.replace(config, index_dir=str(tmp_path / "none")), with_generator=False)


def test_the_command(world, tmp_path):
    flags = [f"--data={world.data}", f"--embedder={world.embedder}", f"--index_dir={tmp_path}/made", "--index=SQ8"]
    done = world.command("-m", "ragjax.index", *flags)
    assert done.returncode == 0, done.stderr
    assert "SQ8 over" in done.stdout and "passages/s" in done.stderr
