"""The pipeline over indexes that are wrong about the passages: what they rank by reaches nobody.

An index proposes rows alone, so it has no scores to be wrong in; these propose the right rows in the wrong order, or
passages that are not the nearest.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from ragjax.config import RunConfig
from ragjax.costs import Cost, Ledger
from ragjax.data.dataset import Dataset, load_dataset
from ragjax.evaluation import evaluate
from ragjax.pipeline import Pipeline, build_pipeline, load_models
from ragjax.retrieval import Proposal
from ragjax.runs import ask
from ragjax.training.health import RetrievalHealth
from ragjax.training.signals import AnswerAssembler
from ragjax.training.strategies import STRATEGIES
from tests.tiny_runs import batch_of, read_lines, run_of, tiny_world
from tests.training.signals_worker import placed

DECODERS = ("concat", "rag_token", "rag_sequence")


@dataclasses.dataclass(frozen=True)
class Reversed:
    """Finds what another index finds, the best last."""

    index: Any

    def search(self, queries, k):
        found = self.index.search(queries, k)
        return Proposal(found.passage_rows[:, ::-1], found.cost)

    def describe(self):
        return {"type": "reversed"}


@dataclasses.dataclass(frozen=True)
class ByText:
    """Proposes passages by the question's text alone: k + 2 that follow its length."""

    passages: int

    def search(self, queries, k):
        return Proposal(np.array([self.rows_of(text, k) for text in queries.texts], np.int64), Cost())

    def describe(self):
        return {"type": "by text"}

    def rows_of(self, text: str, k: int) -> list[int]:
        return [(len(text) + 7 * place) % self.passages for place in range(k + 2)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(scope="module")
def dataset(world) -> Dataset:
    return load_dataset(world.data)


@pytest.fixture(scope="module")
def config(world) -> RunConfig:
    """The tiny embedder's passages are nearly parallel: a high scale makes them differ in probability."""
    return world.config(world.folder / "pipeline", top_k=4, score_scale=200.0, eval_limit=3)


@pytest.fixture(scope="module")
def pipeline(config, dataset) -> Pipeline:
    return build_pipeline(config, dataset, *load_models(config), show_progress=False)


def over(pipeline: Pipeline, index: Any) -> Pipeline:
    """The pipeline with another index over the same vectors."""
    return dataclasses.replace(pipeline, retriever=dataclasses.replace(pipeline.retriever, index=index))


@pytest.fixture(scope="module")
def backwards(pipeline) -> Pipeline:
    return over(pipeline, Reversed(pipeline.retriever.index))


def shares_of(pipeline: Pipeline, texts: list[str], question: str, scale: float) -> np.ndarray:
    """softmax(scale * <x, z>) over passages of these texts, embedded anew, in float64."""
    vectors = pipeline.embedder.encode([question, *texts]).astype(np.float64)
    logits = scale * (vectors[1:] @ vectors[0])
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


@pytest.mark.parametrize("decoder", DECODERS)
def test_ask_orders_and_weighs_passages_by_their_vectors(pipeline, backwards, dataset, config, decoder):
    config = dataclasses.replace(config, decode=decoder)
    for question in dataset.test[:2]:
        right, wrong = (ask(one, question.question, config) for one in (pipeline, backwards))
        assert wrong.passages == right.passages
        np.testing.assert_array_equal(wrong.probabilities, right.probabilities)
        np.testing.assert_array_equal(wrong.posterior, right.posterior)
        assert (wrong.text, wrong.probability) == (right.text, right.probability)


def test_the_probabilities_of_whatever_is_proposed_follow_from_the_vectors(pipeline, dataset, config):
    strange = over(pipeline, ByText(len(dataset.passages)))
    for question in dataset.test[:3]:
        text = question.question
        candidates = [dataset.passages[row] for row in strange.retriever.index.rows_of(text, 4)]
        shares = shares_of(pipeline, [p.embedder_text for p in candidates], text, 1.0)
        best = [candidates[place] for place in np.argsort(-shares)[:4]]
        found = ask(strange, text, config)
        assert found.passages == best
        assert found.passages != ask(pipeline, text, config).passages
        expected = shares_of(pipeline, [passage.embedder_text for passage in best], text, config.score_scale)
        assert expected[0] > 1.05 * expected[-1]
        # An inner product of float32 vectors from another batch is off by some 1e-7, times the scale.
        np.testing.assert_allclose(found.probabilities, expected, rtol=2e-4)


@pytest.mark.parametrize("decoder", DECODERS)
def test_evaluation_orders_and_weighs_passages_by_their_vectors(
    pipeline, backwards, dataset, config, tmp_path, decoder
):
    config = dataclasses.replace(config, decode=decoder)
    files = [tmp_path / "right.jsonl", tmp_path / "wrong.jsonl"]
    for path, one in zip(files, (pipeline, backwards), strict=True):
        evaluate(one, dataset.test[:3], path, config, passage_answers=True)
    assert files[0].read_bytes() == files[1].read_bytes()
    for line in read_lines(files[1]):
        texts = [dataset.passages[int(entry["id"][1:])].embedder_text for entry in line["passages"]]
        expected = shares_of(pipeline, texts, line["question"], config.score_scale)
        np.testing.assert_allclose([entry["probability"] for entry in line["passages"]], expected, rtol=2e-4)


@pytest.mark.parametrize(
    ("strategy", "phase", "changes"),
    [
        ("joint", 0, {}),
        ("generator", 0, {"objective": "concat_nll"}),
        ("two_phase", 1, {}),
        ("embedder", 0, {"hard_negatives": 2, "ranking_batch_size": 3}),
    ],
)
def test_training_orders_and_weighs_passages_by_their_vectors(
    pipeline, backwards, dataset, config, tmp_path, strategy, phase, changes
):
    """The very batch that the right index gives, figures and work included."""
    made = []
    for name, one in (("right", pipeline), ("wrong", backwards)):
        changed = dataclasses.replace(config, strategy=strategy, run_dir=str(tmp_path / name), **changes)
        run, its_phase = run_of(changed, one, dataset), STRATEGIES[strategy][phase]
        assembler = its_phase.signal.make_assembler(run, its_phase.trains)
        asked = batch_of(assembler, assembler.sampler.train[: assembler.sampler.batch_size])
        made.append(assembler.assemble(asked, placed(run), Ledger()))
    right, wrong = made
    assert jax.tree.structure(wrong.batch) == jax.tree.structure(right.batch)
    jax.tree.map(np.testing.assert_array_equal, wrong.batch, right.batch)
    np.testing.assert_array_equal(wrong.passage_rows, right.passage_rows)
    assert (wrong.figures, wrong.work) == (right.figures, right.work)


@pytest.mark.parametrize(("strategy", "phase"), [("joint", 0), ("embedder", 0), ("two_phase", 1)])
def test_each_side_is_read_behind_its_own_prefix(pipeline, dataset, config, tmp_path, strategy, phase):
    """In search and in training: all is as if the prefixes stood in the texts."""
    bare, given = pipeline.embedder, {"query_prefix": "who: ", "passage_prefix": "the town "}
    changed = dataclasses.replace(config, strategy=strategy, run_dir=str(tmp_path), hard_negatives=2, **given)
    embedder = load_models(changed)[0]
    prefixed = build_pipeline(changed, dataset, embedder, pipeline.generator, show_progress=False)
    stored = prefixed.retriever.vectors.vectors_of(range(len(dataset.passages)))
    passages = bare.encode([f"the town {passage.embedder_text}" for passage in dataset.passages])
    np.testing.assert_allclose(stored, passages, rtol=0, atol=1e-6)
    assert np.abs(passages - bare.encode([passage.embedder_text for passage in dataset.passages])).max() > 1e-2
    asked = [f"who: {question.question}" for question in dataset.train]
    found = prefixed.retrieve([question.question for question in dataset.train], 3)
    nearest = np.sort(bare.encode(asked) @ passages.T, axis=1)[:, :-4:-1]
    np.testing.assert_allclose(found.scores, nearest, rtol=0, atol=1e-6)
    run, its_phase = run_of(changed, prefixed, dataset), STRATEGIES[strategy][phase]
    assembler = its_phase.signal.make_assembler(run, its_phase.trains)
    questions = assembler.sampler.train[: assembler.sampler.batch_size]
    made = assembler.assemble(batch_of(assembler, questions), placed(run), Ledger())
    tokens = bare.query_tokens([f"who: {question.question}" for question in questions])
    rows = made.batch.question_tokens.reshape(-1, made.batch.question_tokens.shape[-1])
    lengths = made.batch.question_lengths.reshape(-1)
    assert [row[:length].tolist() for row, length in zip(rows, lengths, strict=True) if length] == tokens


def test_the_health_of_the_retrieval_is_of_the_nearest_passages(pipeline, backwards, dataset):
    """Recall at 5 of the nearest, also where --top_k is smaller than what is looked at."""
    found = [
        RetrievalHealth(one, dataset.train, top_k=2).measure(one.embedder.variables).figures
        for one in (pipeline, backwards)
    ]
    assert found[0] == found[1]


def test_training_counts_the_work_that_the_index_reports(pipeline, dataset, config):
    """A product of each question with each passage: 2 * 2 * 30 * 32 operations."""
    ledger = Ledger()
    run = run_of(config, pipeline, dataset)
    assembler = AnswerAssembler(run, STRATEGIES["joint"][0].trains)
    assembler.assemble(batch_of(assembler, dataset.train[:2]), placed(run), ledger)
    assert ledger.part("search").flops == 2.0 * 2 * 30 * 32
    assert ledger.part("search").seconds > 0
