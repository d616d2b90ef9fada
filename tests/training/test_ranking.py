"""Batches of multiple negatives ranking: candidates, what counts as a negative, and the loss of a whole step."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import linen as nn

from ragjax.config import RunConfig
from ragjax.costs import Ledger, ModelSize, train_flops
from ragjax.data.dataset import Dataset
from ragjax.data.passages import PassageList
from ragjax.data.questions import Passage, Question
from ragjax.errors import UserError
from ragjax.retrieval import ArrayVectors, ExactIndex, Retriever
from ragjax.training.signals import RankingAssembler
from tests.tiny_runs import batch_of, run_of, tiny_world
from tests.training.signals_worker import RANKING, on_eight_devices, ranking_pipeline, ranking_step

# --- hand-made vectors: passage i of the corpus points at 10 * i degrees

ANGLES = [0, 10, 20, 30, 40, 50, 60, 70]


def directions(angles) -> np.ndarray:
    radians = np.deg2rad(np.asarray(angles, np.float64))
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def question(name: str, angle: float, *positives: int) -> tuple[Question, float]:
    return Question(name, f"question {name}", ("yes",), tuple(f"p{i}" for i in positives)), angle


class Made:
    """An assembler over questions with hand-made vectors; the embedder's network is never asked."""

    def __init__(
        self, train: list[tuple[Question, float]], dev: list[tuple[Question, float]] = (), texts=None, **changes
    ):
        angles = {q.question: angle for q, angle in [*train, *dev]}
        passages = [Passage(f"p{i}", "", (texts or {}).get(i, f"passage {i}")) for i in range(len(ANGLES))]
        self.embedder = SimpleNamespace(
            module=nn.Module(),  # which nothing here runs
            size=ModelSize(100, 0, 0, 1, 8),
            query_tokens=lambda texts: [[1, *range(2, 2 + len(text) % 7), 3] for text in texts],
            encode_queries=lambda texts: directions([angles[text] for text in texts]),
        )
        vectors = directions(ANGLES)
        retriever = Retriever(ExactIndex(vectors), ArrayVectors(vectors))
        pipeline = SimpleNamespace(embedder=self.embedder, store=PassageList(passages), retriever=retriever)
        splits = {"train": [q for q, _ in train], "dev": [q for q, _ in dev], "test": []}
        dataset = Dataset("made", Path("made"), PassageList(passages), **splits, sha256="")
        self.config = RunConfig(
            **{
                "strategy": "embedder",
                "ranking_batch_size": len(train),
                "hard_negatives": 0,
                "negative_filter": "labels",
                "negative_margin": 0.0,
            }
            | changes
        )
        self.assembler = RankingAssembler(run_of(self.config, pipeline, dataset))

    def assemble(self, questions=None, step=0, training=True):
        questions = self.assembler.sampler.train if questions is None else questions
        return self.assembler.assemble(batch_of(self.assembler, questions, step, training), {}, Ledger())

    def batch(self, *arguments, **options):
        """The one device's one micro-batch."""
        return jax.tree.map(lambda leaf: leaf[0, 0], self.assemble(*arguments, **options).batch)


def rows_of(vectors: np.ndarray) -> list[int]:
    """Corpus rows of hand-made candidate vectors, -1 for the padding behind them."""
    degrees = np.rad2deg(np.arctan2(vectors[:, 1], vectors[:, 0])).round()
    return [int(d) // 10 if np.linalg.norm(v) > 0.5 else -1 for d, v in zip(degrees, vectors, strict=True)]


def test_each_questions_positive_stands_in_its_column():
    made = Made([question("a", 0, 3), question("b", 0, 6), question("c", 0, 1)])
    batch = made.batch()
    assert rows_of(batch.candidate_vectors) == [3, 6, 1]
    assert batch.labels.tolist() == [0, 1, 2]
    assert (batch.candidate_mask | np.eye(3, dtype=bool)).all()
    assert batch.question_lengths.tolist() == [len(t) for t in made.embedder.query_tokens(["question a"] * 3)]


def test_my_other_positives_are_no_negatives():
    """a's second positive is b's label; c's positive stands among b's hard negatives; nobody else is spared."""
    # Four degrees off the tens, so that no two passages are equally near.
    train = [question("a", 4, 3, 6), question("b", 64, 6), question("c", 54, 5)]
    (seed,) = [s for s in range(20) if drawn(Made(train, seed=s), 0)["a"] == 3][:1]
    made = Made(train, hard_negatives=2, seed=seed)
    batch = made.batch()
    # Near a: 0, 1; near b (at 64, 6 is the positive): 7, 5; near c (at 54, 5 is the positive): 6, 4.
    assert rows_of(batch.candidate_vectors) == [3, 6, 5, 0, 1, 7, 5, 6, 4]
    counted = batch.candidate_mask.copy()
    counted[[0, 1, 2], [0, 1, 2]] = True  # the loss takes the label whatever the mask says
    expected = [
        [True, False, True, True, True, True, True, False, True],  # 6 is a's, too, in both places
        [True, True, True, True, True, True, True, False, True],
        [True, True, True, True, True, True, False, True, True],
    ]
    assert counted.tolist() == expected


def drawn(made: Made, epoch: int) -> dict[str, int]:
    """The positive of each question in an epoch."""
    count, size = len(made.assembler.sampler.train), made.assembler.sampler.batch_size
    found = {}
    for place in range(-(-count // size)):
        questions = made.assembler.sampler.train[place * size : (place + 1) * size]
        batch = made.batch(questions, step=epoch * -(-count // size) + place)
        rows = rows_of(batch.candidate_vectors)
        found |= {q.id: rows[label] for q, label in zip(questions, batch.labels, strict=False)}
    return found


def test_hard_negatives_are_the_nearest_in_order_without_the_positives():
    made = Made([question("a", 34, 3, 2), question("b", 71, 0)], hard_negatives=3)
    # From 34 degrees: 3, 4, 2, 5, 1, 6 of which 3 and 2 are positives; from 71: 7, 6, 5.
    assert rows_of(made.batch().candidate_vectors)[2:] == [4, 5, 1, 7, 6, 5]


def test_hard_negatives_follow_the_untrained_embedder():
    """They are looked up once: what the embedder becomes does not move them."""
    made = Made([question("a", 34, 0), question("b", 71, 0)], hard_negatives=1)
    made.embedder.encode_queries = None
    assert rows_of(made.batch().candidate_vectors)[2:] == [3, 7]


def test_gist_spares_what_the_untrained_embedder_puts_above_the_positive():
    """In the batch it is masked; among the hard negatives the next ones take its place."""
    # a at 4 degrees, positive 2 (16 away): 0 (4 away) and 1 (6) lie above; b at 71, positive 5 (21): 7 and 6 above.
    train = [question("a", 4, 2), question("b", 71, 5), question("d", 1, 0)]
    everyone = Made(train, hard_negatives=2).batch()
    assert rows_of(everyone.candidate_vectors) == [2, 5, 0, 0, 1, 7, 6, 1, 2]
    assert everyone.candidate_mask[0].tolist() == [False, True, True, True, True, True, True, True, False]
    spared = Made(train, hard_negatives=2, negative_filter="gist").batch()
    assert rows_of(spared.candidate_vectors) == [2, 5, 0, 3, 4, 4, 3, 1, 2]
    # d's label 0 and its hard negative 1 are no negatives of a.
    assert spared.candidate_mask.tolist() == [
        [False, True, False, True, True, True, True, False, False],
        [True, False, True, True, True, True, True, True, True],
        [True, True, False, True, True, True, True, True, True],
    ]


def test_a_margin_keeps_negatives_away_from_the_positive():
    """a at 4 degrees, positive 2: cos 16 = 0.961. With a tenth of that as margin: below 0.865, 30.1 degrees away."""
    train = [question("a", 4, 2), question("b", 71, 5)]
    near = Made(train, hard_negatives=2, negative_filter="gist", negative_margin=0.1).batch()
    # 3 is 26 away, 4 is 36. b, at 71: cos 21 = 0.934, so below 0.840, 32.8 degrees: 4 is 31 away, 3 is 41.
    assert rows_of(near.candidate_vectors) == [2, 5, 4, 5, 3, 2]
    assert near.candidate_mask.tolist() == [
        [False, True, True, True, False, False],
        [True, False, False, False, True, True],
    ]


def test_a_candidate_as_near_as_the_positive_stays_a_negative():
    """Above it, not beside it: 3 and 4 are equally far from 35 degrees."""
    made = Made([question("a", 35, 3), question("b", 71, 4)], negative_filter="gist")
    guide = np.float64(directions([35])[0])
    vectors = np.float64(directions(ANGLES))
    assert (vectors[4] @ guide <= vectors[3] @ guide) == made.batch().candidate_mask[0, 1]


def test_one_positive_a_question_and_epoch_is_drawn_by_seed():
    train = [question(name, 0, 1, 4) for name in "abcdefgh"]
    draws = {seed: [drawn(Made(train, seed=seed), epoch) for epoch in range(6)] for seed in (0, 1)}
    assert draws[0] == [drawn(Made(train, seed=0), epoch) for epoch in range(6)]
    assert draws[0] != draws[1]
    for seed in (0, 1):
        for name in "abcdefgh":
            assert {draw[name] for draw in draws[seed]} <= {1, 4}
        assert {draw["a"] for draw in draws[seed]} == {1, 4}  # over the epochs
        assert set(draws[seed][0].values()) == {1, 4}  # over the questions
    # Whatever batch a question comes in, its positive belongs to the epoch.
    assert drawn(Made(train, seed=0, ranking_batch_size=3), 2) == draws[0][2]


def test_dev_questions_keep_their_positive():
    """The dev loss of step 0 and of step 100 measures the same."""
    dev = [question(name, 0, 1, 4) for name in "abcdefgh"]
    made = Made([question("t", 0, 1)], dev, ranking_batch_size=8, dev_every=10)
    batches = [made.batch(made.assembler.sampler.dev, step=step, training=False) for step in range(4)]
    assert len({tuple(rows_of(batch.candidate_vectors)) for batch in batches}) == 1


def test_unlabelled_questions_are_skipped():
    train = [question("a", 0, 3), question("b", 0), question("c", 0, 1), question("d", 0)]
    dev = [question("e", 0), question("f", 0, 2)]
    sampler = Made(train, dev, dev_every=1).assembler.sampler
    assert [q.id for q in sampler.train] == ["a", "c"]
    assert [q.id for q in sampler.dev] == ["f"]
    assert Made(train, dev, dev_every=0).assembler.sampler.dev == []


def test_questions_of_both_splits_may_have_one_id():
    """Ids are unique within a file only: the dev question "a" has other positives than the training question "a"."""
    other = dataclasses.replace(question("a", 34, 5)[0], question="another question")
    made = Made([question("a", 4, 3), question("b", 64, 6)], [(other, 34)], dev_every=1, hard_negatives=1)
    batch = made.batch()
    # Nearest to 4 degrees is 0, to 64 it is 6 (the positive), then 7 (70) before 5.
    assert rows_of(batch.candidate_vectors) == [3, 6, 0, 7]
    assert batch.candidate_mask[0].tolist() == [False, True, True, True]  # 3 is the label
    dev = made.batch(made.assembler.sampler.dev, training=False)
    assert rows_of(dev.candidate_vectors)[:2] == [5, 3]


def test_a_copy_of_a_positive_is_no_negative():
    """Passages 2 and 7 say what passage 3 says, but for case and spacing: no hard negatives, masked where others' are.

    b's label is 7, a copy of a's label 3.
    """
    texts = {2: "The  Old Town", 3: "the old town", 7: "The old town "}
    train = [question("a", 24, 3), question("b", 71, 7)]
    batch = Made(train, hard_negatives=2, texts=texts).batch()
    # Near 24 degrees: 2 (a copy), 3 (the positive), 1, 4; near 71: 7 (the positive), 6, 5.
    assert rows_of(batch.candidate_vectors) == [3, 7, 1, 4, 6, 5]
    assert not batch.candidate_mask[0, 1] and not batch.candidate_mask[1, 0]
    assert batch.candidate_mask[:2, 2:].all()
    # Texts that differ are other passages.
    assert rows_of(Made(train, hard_negatives=2).batch().candidate_vectors)[2:] == [2, 1, 6, 5]


def test_no_labelled_question_is_an_error():
    with pytest.raises(UserError, match=r"no training question of made has positive_ids, .*--strategy=embedder"):
        Made([question("a", 0), question("b", 0)], [question("c", 0, 1)])


def test_more_hard_negatives_than_passages_are_an_error():
    train = [question("a", 4, 3, 6), question("b", 64, 6)]
    assert len(Made(train, hard_negatives=6).batch().candidate_vectors) == 2 * 7
    with pytest.raises(UserError, match=r"--hard_negatives=7 are more than the 8 passages"):
        Made(train, hard_negatives=7)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_last_batch_of_an_epoch_has_the_shapes_of_the_others(accumulation):
    """Its missing questions are fillers, its missing candidates count for nobody."""
    train = [question(name, 4, i) for i, name in enumerate("abcde")]
    options = {"ranking_batch_size": 4, "hard_negatives": 2, "gradient_accumulation": accumulation}
    made = Made(train, **options)
    full, last = (
        made.assemble(made.assembler.sampler.train[:4]),
        made.assemble(made.assembler.sampler.train[4:], step=1),
    )
    for one, other in zip(full.batch, last.batch, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert one.shape[:2] == (1, accumulation)
    batch = jax.tree.map(lambda leaf: leaf[0, 0], last.batch)
    assert rows_of(batch.candidate_vectors) == [4, 0, 1, *[-1] * 9]
    assert not batch.candidate_mask[:, 3:].any() and not batch.candidate_mask[1:].any()
    assert (last.batch.question_lengths > 0).sum() == 1
    assert (full.figures, last.figures) == ({"candidates": 4}, {"candidates": 3})


def test_every_micro_batch_sees_all_candidates():
    train = [question(name, 4, i) for i, name in enumerate("abcde")]
    whole = Made(train).assemble().batch
    parts = Made(train, gradient_accumulation=2).assemble().batch
    for place in range(2):
        np.testing.assert_array_equal(parts.candidate_vectors[0, place], whole.candidate_vectors[0, 0])
    assert parts.labels[0].reshape(-1)[:5].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(parts.candidate_mask[0].reshape(6, 5)[:5], whole.candidate_mask[0, 0])


def test_only_the_questions_are_work():
    """Passages are frozen: nothing is embedded for them."""
    made = Made([question("a", 0, 3), question("bb", 0, 6)], [question("c", 0, 1)], dev_every=1)
    ledger = Ledger()
    assembled = made.assembler.assemble(batch_of(made.assembler, made.assembler.sampler.train), {}, ledger)
    lengths = list(map(len, made.embedder.query_tokens(["question a", "question bb"])))
    work = assembled.work["embedder"]
    assert set(assembled.work) == {"embedder"} and ledger.total().flops == 0
    assert (work.tokens, work.backward_tokens) == (sum(lengths), sum(lengths))
    assert work.flops == train_flops(made.embedder.size, lengths, 0)
    assert made.assemble(made.assembler.sampler.dev, training=False).work["embedder"].backward_tokens == 0


# --- the loss, on the tiny embedder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(scope="module")
def made_world(world):
    return ranking_pipeline(world)


@pytest.fixture(scope="module")
def one_device(world, made_world):
    return {accumulation: ranking_step(world, *made_world, accumulation) for accumulation in (1, 2)}


def enumerated(config, dataset, pipeline, questions, assembler) -> float:
    """Mean loss from labels and vectors alone, one exponential at a time."""
    row_of = {passage.id: row for row, passage in enumerate(dataset.passages)}
    texts = [passage.embedder_text for passage in dataset.passages]
    passages = pipeline.embedder.encode_passages(texts).astype(np.float64)
    vectors = pipeline.embedder.encode_queries([q.question for q in questions]).astype(np.float64)
    mine = [{row_of[identity] for identity in q.positive_ids} for q in questions]
    # Which of several positives was drawn is not in question here.
    drawn = [assembler._positive(q, assembler._known["train"][i], 0) for i, q in enumerate(questions)]
    assert all(row in rows for row, rows in zip(drawn, mine, strict=True))
    candidates = [*drawn]
    for vector, rows in zip(vectors, mine, strict=True):
        scores = passages @ vector
        limit = np.inf if config.negative_filter == "labels" else min(scores[list(rows)])
        nearest = [row for row in np.argsort(-scores, kind="stable") if row not in rows and scores[row] <= limit]
        candidates += nearest[: config.hard_negatives]
    total, spared = 0.0, 0
    for vector, rows, own in zip(vectors, mine, drawn, strict=True):
        score = config.ranking_scale * float(passages[own] @ vector)
        others = 0.0
        for row in candidates:
            other = config.ranking_scale * float(passages[row] @ vector)
            counts = row not in rows and (config.negative_filter == "labels" or other <= score)
            spared += not counts and row != own
            others += math.exp(other) if counts else 0.0
        total += math.log(math.exp(score) + others) - score
    assert spared > 0
    return total / len(questions)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_equals_enumeration(world, made_world, one_device, accumulation):
    dataset, pipeline = made_world
    config = world.config("unused", **RANKING)
    assembler = RankingAssembler(run_of(config, pipeline, dataset))
    expected = enumerated(config, dataset, pipeline, assembler.sampler.train[:5], assembler)
    assert expected > 0.01
    np.testing.assert_allclose(one_device[accumulation]["metric loss"], expected, rtol=1e-5)
    assert one_device[accumulation]["metric questions"] == 5


@pytest.mark.parametrize("negatives", ["labels", "gist"])
def test_the_loss_of_each_question_equals_enumeration(world, made_world, negatives):
    """Without hard negatives and with them, as the objective gives it."""
    dataset, pipeline = made_world
    for hard in (0, 3):
        config = world.config(
            "unused", ranking_batch_size=6, hard_negatives=hard, negative_filter=negatives, dev_every=0
        )
        assembler = RankingAssembler(run_of(config, pipeline, dataset))
        chosen = assembler.sampler.train[:4]
        batch = assembler.assemble(batch_of(assembler, chosen), {}, Ledger()).batch
        batch = jax.tree.map(lambda leaf: leaf[0, 0], batch)
        found = compiled(assembler.objective, {"embedder": pipeline.embedder.variables}, {"generator": {}}, batch, None)
        assert found.valid.tolist() == [True] * 4 + [False] * 2
        assert found.loss[4:].tolist() == [0.0, 0.0]
        expected = enumerated(config, dataset, pipeline, chosen, assembler)
        np.testing.assert_allclose(found.loss[:4].mean(), expected, rtol=1e-5)


compiled = jax.jit(lambda objective, *rest: objective(*rest), static_argnums=0)


def assert_same_step(got, expected, tolerance):
    assert set(got) == set(expected)
    largest = max(np.linalg.norm(leaf) for name, leaf in expected.items() if name.startswith("gradient"))
    assert largest > 0
    for name, leaf in expected.items():
        # A bias on all keys changes nothing under a softmax: its gradient is rounding noise.
        norm = largest if name.endswith("self/key/bias") else np.linalg.norm(leaf)
        assert np.linalg.norm(got[name] - leaf) <= tolerance * norm, name


def test_micro_batches_change_nothing(one_device):
    assert_same_step(one_device[2], one_device[1], 1e-5)


@pytest.mark.slow
def test_one_and_eight_devices_agree(world, one_device):
    """Five questions: three of the devices hold fillers only."""
    start = "ranking "
    found = {name.removeprefix(start): v for name, v in on_eight_devices(world).items() if name.startswith(start)}
    assert_same_step(found, one_device[1], 1e-5)
