"""Passages' vectors that follow the embedder (--refresh_passages)."""

import contextlib
import dataclasses
import math

import numpy as np
import pytest

import ragjax
from ragjax.config import CompareConfig, RunConfig, SearchConfig
from ragjax.data.prompts import prompt_text
from ragjax.errors import UserError
from ragjax.parallel import to_host
from ragjax.rates import search_rates
from ragjax.runs import RunFolder, open_run, prepare
from ragjax.training import train
from ragjax.training.loop import Trainer, train_phase
from ragjax.training.passages import MovingPassages
from ragjax.training.records import MetricsLog
from ragjax.training.signals import RankingAssembler
from ragjax.training.strategies import STRATEGIES, phases_of
from tests.tiny_runs import flat, read_lines, tiny_world

(JOINT,) = STRATEGIES["joint"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(scope="module")
def prepared(world):
    return prepare(world.config("unused", refresh_passages=2, dev_every=0, embedder_lr=1e-2, max_steps=5))


def placed(prepared, folder, **changes):
    return dataclasses.replace(
        prepared, config=dataclasses.replace(prepared.config, **changes), files=RunFolder(folder)
    )


def encoded(run, embedder_params) -> np.ndarray:
    """The passages by an embedder with these parameters, from its public face."""
    texts = [passage.embedder_text for passage in run.dataset.passages]
    return dataclasses.replace(run.embedder, params=embedder_params).encode_passages(texts)


def mean_distance(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one.astype(np.float64), other.astype(np.float64)
    cosines = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(one, other, strict=True)]
    return 1.0 - float(np.mean(cosines))


def test_every_second_step_reads_what_the_embedder_makes_of_the_passages(prepared, tmp_path):
    """The third step's loss by enumeration, with both sides of every score from the embedder after two steps."""
    run = placed(prepared, tmp_path, generator_lr=1e-12, objective="rag_sequence")
    with contextlib.closing(MetricsLog(run.files)) as log:
        trainer, states, lines = Trainer(run, JOINT, log), [], []
        for _ in range(5):
            states.append(to_host(trainer.state.trainable["embedder"]["params"]))
            lines.append(trainer.advance()[0])
        batch = trainer._sampler.training_batch(2)
    assert [line["passages_age"] for line in lines] == [0, 1, 0, 1, 0]
    vectors = [encoded(run, state) for state in states]
    assert [line.get("passages_moved") for line in lines] == [
        None,
        None,
        pytest.approx(mean_distance(vectors[0], vectors[2]), rel=1e-3),
        None,
        pytest.approx(mean_distance(vectors[2], vectors[4]), rel=1e-3),
    ]
    assert lines[2]["passages_moved"] > 1e-4
    losses = {}
    for moment in (0, 2):  # the vectors of the first step would give another loss
        losses[moment] = np.mean([nll(run, question, states[2], vectors[moment]) for question in batch.questions])
    assert lines[2]["loss"] == pytest.approx(losses[2], rel=1e-5)
    assert abs(losses[2] - losses[0]) > 1e-4 * losses[2]


def nll(run, question, embedder_params, vectors: np.ndarray) -> float:
    """-log p(y|x) of RAG-Sequence over the best passages, in float64."""
    asked = dataclasses.replace(run.embedder, params=embedder_params)
    scores = vectors.astype(np.float64) @ asked.encode_queries([question.question])[0].astype(np.float64)
    best = np.argsort(-scores)[: run.config.top_k]
    shares = np.exp(run.config.score_scale * (scores[best] - scores[best].max()))
    prompts = [prompt_text([run.dataset.passages[row]], question.question) for row in best]
    answers = run.generator.answer_log_probs(prompts, [question.answers[0]] * len(best))
    total = sum(share * math.exp(np.sum(row, dtype=np.float64)) for share, row in zip(shares, answers, strict=True))
    return -math.log(total / shares.sum())


def test_a_measurement_refreshes_and_a_phase_goes_on_with_the_vectors_of_its_checkpoint(prepared, tmp_path):
    """Stopped between two refreshes, and where a measurement has made one."""
    changes = {"dev_every": 3, "keep": "best", "dev_limit": 1}
    whole = placed(prepared, tmp_path / "whole", **changes)
    train_phase(whole, JOINT)
    lines = [line for line in read_lines(whole.files.metrics_file) if line["step"]]
    # Refreshed before the third step (2 steps old), for the measurement after it, and again after the fifth.
    assert [line["passages_age"] for line in lines] == [0, 1, 0, 0, 1]
    assert [line["step"] for line in lines if "dev_passages_moved" in line] == [3, 5]
    parts = placed(prepared, tmp_path / "parts", **changes)
    for step in (1, 3, 4, 5):
        result = train_phase(parts, JOINT, stop_at=step)
    assert parts.files.metrics_file.read_bytes() == whole.files.metrics_file.read_bytes()
    for name, leaf in flat(train_phase(whole, JOINT).trained).items():
        np.testing.assert_array_equal(flat(result.trained)[name], leaf, err_msg=name)
    cost = result.cost.part("encode")
    texts = [passage.embedder_text for passage in whole.dataset.passages]
    assert cost.tokens == 3 * sum(map(len, whole.embedder.passage_tokens(texts))) and cost.flops > 0


def test_a_run_ends_over_the_vectors_of_the_embedder_that_it_keeps(world, tmp_path):
    config = world.config(tmp_path / "run", refresh_passages=3, max_steps=2, dev_every=0, eval_limit=2)
    summary = train(config)
    opened = open_run(tmp_path / "run")
    wanted = encoded(opened, opened.embedder.params)
    found = opened.pipeline.retriever.vectors.vectors_of(range(len(wanted)))
    np.testing.assert_array_equal(found, wanted)
    assert mean_distance(wanted, encoded(opened, prepare(config).embedder.params)) > 1e-4
    query = opened.embedder.encode_queries(["Which number has the town Arby?"])[0]
    (best,) = opened.retrieve(["Which number has the town Arby?"], 1).passage_rows
    assert best[0] == np.argmax(wanted.astype(np.float64) @ query.astype(np.float64))
    with pytest.raises(UserError, match="trained with --refresh_passages=3, and has vectors of its own"):
        open_run(tmp_path / "run", search={"hops": 2})
    # Encoded before the run and at its end; never within its two steps.
    assert summary.cost["phases"]["joint"]["encode"]["tokens"] == 0
    texts = [passage.embedder_text for passage in opened.dataset.passages]
    assert summary.cost["encode"]["tokens"] == 2 * sum(map(len, opened.embedder.passage_tokens(texts)))


def test_labels_are_learnt_from_refreshed_vectors_and_filtered_by_the_untrained(world, prepared, tmp_path):
    run = placed(prepared, tmp_path, hard_negatives=2, negative_filter="gist", negative_margin=0.05)
    moving = MovingPassages(run)
    assembler = RankingAssembler(moving.run)
    batch = assembler.sampler.training_batch(0)
    before = assembler.assemble(batch, {}, None).batch
    rng = np.random.default_rng(0)
    other = rng.standard_normal((len(run.dataset.passages), run.embedder.width), dtype=np.float32)
    moving.restore({"vectors": other}, {"step": 1})
    after = assembler.assemble(batch, {}, None).batch
    np.testing.assert_array_equal(after.candidate_mask, before.candidate_mask)
    positives = [run.dataset.passages.rows_of(question.positive_ids)[0] for question in batch.questions]
    np.testing.assert_array_equal(after.candidate_vectors[0, 0][: len(positives)], other[positives])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"strategy": "generator"}, "and --strategy=generator trains none: choose --strategy=embedder, independent, "),
        ({"strategy": "none"}, "and --strategy=none trains none"),
        ({"hops": 2}, "is for one search of all vectors on the host, and --hops=2 is not: leave one out"),
        ({"rerank": "generator"}, "and --rerank=generator is not"),
        ({"search_on": "device"}, "and --search_on=device is not"),
        ({"index_dir": "indexes/mine"}, "and --index_dir=indexes/mine is not"),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        phases_of(RunConfig(refresh_passages=2, **{"strategy": "joint"} | changes))


def test_a_comparison_refuses_it_before_its_first_run(world, tmp_path):
    """Also where the first rows train no embedder, and so would go through."""
    config = world.config(tmp_path / "compared", refresh_passages=2, search_on="device")
    with pytest.raises(UserError, match="and --search_on=device is not"):
        ragjax.compare(config, CompareConfig(strategies="none,rag_token"))
    with pytest.raises(UserError, match="follows an embedder that moves"):
        ragjax.compare(dataclasses.replace(config, search_on="host"), CompareConfig(strategies="none,generator"))


def test_a_search_of_rates_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="trains copies of it at many rates together"):
        search_rates(world.config(tmp_path, refresh_passages=2, strategy="two_phase"), SearchConfig())
    with pytest.raises(UserError, match="trains copies of it at many rates together: leave one of them out"):
        ragjax.compare(world.config(tmp_path / "compared", refresh_passages=2), CompareConfig(search=True))
