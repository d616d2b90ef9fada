"""The flags of the search in a whole run: what is proposed, recorded, read and measured."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from ragjax import api
from ragjax.config import RunConfig
from ragjax.data import load_dataset
from ragjax.errors import UserError
from ragjax.files import default_cache_dir
from ragjax.metrics import recall_at_k
from ragjax.pipeline import build_pipeline, load_models
from ragjax.retrieval import Bm25Index
from ragjax.runs import open_run
from ragjax.training import train
from tests.tiny import write_tiny_bert
from tests.tiny_folders import make_cross_encoder
from tests.tiny_runs import read_lines, refusal, tiny_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        if not (world.folder / "cross").exists():
            make_cross_encoder(write_tiny_bert(world.folder / "cross"))
        yield world


@pytest.fixture(scope="module")
def parts(world):
    config = world.config(world.folder / "flags", top_k=4)
    return config, load_dataset(world.data), *load_models(config)


def types_of(description) -> list[str]:
    """The types of an index and of all that it is made of."""
    if not isinstance(description, dict):
        return []
    own = [description["type"]] if "type" in description else []
    return own + [kind for part in description.values() for kind in types_of(part)]


@pytest.mark.parametrize(
    ("changes", "types"),
    [
        ({}, ["Flat"]),
        ({"search_on": "device", "device_dtype": "int8"}, ["DeviceIndex"]),
        ({"retriever": "bm25"}, ["BM25"]),
        ({"retriever": "hybrid", "search_on": "device"}, ["hybrid", "DeviceIndex", "BM25"]),
        ({"retriever": "hybrid", "hops": 2}, ["two hops", "hybrid", "Flat", "BM25"]),
        ({"rerank": "generator", "rerank_top": 6}, ["reranked", "generator", "Flat"]),
        ({"rerank": "cross", "hops": 2}, ["reranked", "cross-encoder", "two hops", "Flat"]),
    ],
)
def test_each_flag_chooses_its_index(world, parts, changes, types):
    config, dataset, embedder, generator = parts
    if changes.get("rerank") == "cross":
        changes = changes | {"rerank": str(world.folder / "cross")}
    config = dataclasses.replace(config, **changes)
    pipeline = build_pipeline(config, dataset, embedder, generator, show_progress=False)
    assert types_of(pipeline.retriever.index.describe()) == types
    found = pipeline.retrieve([question.question for question in dataset.dev], 4)
    assert all(len(set(rows)) == 4 for rows in found.passage_rows.tolist())
    # Whatever has proposed them, vectors decide the order.
    vectors = pipeline.retriever.vectors.vectors_of(found.passage_rows).astype(np.float64)
    asked = embedder.encode_queries([question.question for question in dataset.dev]).astype(np.float64)
    np.testing.assert_allclose(found.scores, (vectors * asked[:, None]).sum(-1), rtol=1e-6)
    assert (np.diff(found.scores) <= 0).all()


def test_words_find_the_town_that_a_question_names(parts):
    """A random embedder does not; each question's town stands in one title."""
    config, dataset, embedder, generator = parts
    config = dataclasses.replace(config, retriever="bm25")
    pipeline = build_pipeline(config, dataset, embedder, generator, show_progress=False)
    found = pipeline.retrieve([question.question for question in dataset.test], 1)
    assert pipeline.store.ids_of(found.passage_rows[:, 0]) == [question.positive_ids[0] for question in dataset.test]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"device_dtype": "int8"}, "--device_dtype is of vectors on the accelerators: add --search_on=device"),
        ({"device_recall": 0.9}, "--device_recall is of vectors on the accelerators"),
        ({"search_on": "device", "retriever": "bm25"}, "--retriever=bm25 reads none: leave one of them out"),
        ({"hops": 2, "top_k": 1}, "give --top_k at least 2"),
        ({"rerank": "generator", "rerank_top": 2}, "--rerank_top=2 is less than --top_k=3: raise it"),
        ({"rerank": "/no/such/folder"}, "--rerank=/no/such/folder is no folder, and no cross-encoder"),
    ],
)
def test_flags_that_cannot_be_meant(world, tmp_path, changes, sentence):
    assert sentence in refusal(world.config(tmp_path, **changes))


def test_the_values_of_the_flags():
    with pytest.raises(UserError, match="--retriever=splade is not known: choose from dense, bm25, hybrid"):
        RunConfig(retriever="splade")
    with pytest.raises(UserError, match="--hops=3 is out of range"):
        RunConfig(hops=3)


@pytest.fixture(scope="module")
def run(world):
    """Measured with everything at once; tests/test_pipeline.py trains over indexes of other kinds."""
    config = world.config(
        world.folder / "searched",
        strategy="none",
        decode="none",
        retriever="hybrid",
        hops=2,
        rerank=str(world.folder / "cross"),
        rerank_top=6,
        eval_limit=3,
    )
    train(config)
    return api.open_run(config.run_dir)


def test_a_run_records_what_it_searched_with(run):
    recorded = json.loads((run.folder / "config.json").read_text())
    assert recorded["index"]["reranker"]["source"].startswith(str(run.config.rerank))
    assert types_of(recorded["index"]) == types_of(run.summary.retrieval["index"])
    assert types_of(recorded["index"]) == ["reranked", "cross-encoder", "two hops", "hybrid", "Flat", "BM25"]
    assert recorded["flags"]["hops"] == 2
    assert run.retrieve(["Which number has the town Arby?"], 3).passage_rows.shape == (1, 3)


def test_another_reranker_in_the_same_place_is_refused(run):
    """As other weights of the run's own models are."""
    settings = Path(run.config.rerank) / "tokenizer_config.json"
    before = settings.read_text()
    settings.write_text(json.dumps(json.loads(before) | {"truncation_side": "left"}))
    try:
        with pytest.raises(UserError, match=r"was made with a different --rerank \(sha256 \w{12}, now \w{12}\)"):
            open_run(run.folder, with_generator=False)
        assert open_run(run.folder, with_generator=False, search={"rerank": ""}).config.hops == 2
    finally:
        settings.write_text(before)


def test_an_evaluation_searches_as_it_is_told(run, parts):
    """Recall@k is that of the k passages that words propose, not of the best k of more by vectors."""
    _, dataset, *_ = parts
    first = api.evaluate(run, decode="none", split="test", retriever="bm25", hops=1, rerank="", top_k=2)
    (result,) = first.results
    assert json.loads(first.path.read_text())["index"]["type"] == "BM25"
    assert result.path.name == "test.none.k2.bm25.jsonl"
    words = Bm25Index(dataset.passages, default_cache_dir() / "bm25", show_progress=False)
    for line, question in zip(read_lines(result.path), dataset.test, strict=True):
        for k in (1, 2, 5, 10, 20):
            scores = np.array(words.scores(question.question), np.float64)
            ids = dataset.passages.ids_of(np.argsort(-scores, kind="stable")[:k])
            assert line[f"recall_at_{k}"] == recall_at_k(ids, question.positive_ids, k)
    again = api.evaluate(run, decode="none", split="test")
    assert again.results[0].path.name == "test.none.k3.hybrid.hops2.cross6.jsonl"
    assert again.run is run
    assert first.run.config.retriever == "bm25"


def test_the_untrained_models_can_be_searched_with_too(world, tmp_path):
    from ragjax.config import EvaluateConfig
    from ragjax.evaluation import evaluate_runs

    config = EvaluateConfig(
        embedder=str(world.embedder), data=str(world.data), decode=("none",), out=str(tmp_path), split="dev"
    )
    found = evaluate_runs(config, {"retriever": "bm25"})
    assert found.results[0].scores["recall_at_1"][0] == 1.0
