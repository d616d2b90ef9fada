"""Training with a gradient through a few drawn passages: what a step holds, its gradient and its cost."""

import dataclasses

import jax
import numpy as np
import pytest

from ragjax.config import RunConfig
from ragjax.costs import Ledger, forward_flops, train_flops
from ragjax.data.batches import DrawnBatch, ScoredBatch, Shape, make_example_rows, place_examples
from ragjax.errors import UserError
from ragjax.models.lora import LoraConfig
from ragjax.runs import prepare
from ragjax.scoring import score_answers
from ragjax.training.draws import answer_shares, draw_passages
from ragjax.training.objectives import AnswerMixture, AnswerObjective, DrawnObjective
from ragjax.training.signals import AnswerAssembler, DrawnAssembler
from ragjax.training.step import summed_loss
from ragjax.training.strategies import STRATEGIES, phases_of
from tests.tiny_modules import random_examples, stacked_batch, tiny_bert, tiny_decoder
from tests.tiny_runs import tiny_world
from tests.training.signals_worker import drawn_step, on_eight_devices, placed

pytestmark = pytest.mark.slow

(JOINT,) = STRATEGIES["joint"]
SHAPE = Shape(15, 64, 8)


# --- the gradient of the networks

compiled_gradient = jax.jit(jax.grad(summed_loss, argnums=1, has_aux=True), static_argnums=0)


class Networks:
    """Random models, five questions under three passages, and the exact gradient."""

    def __init__(self, objective: str):
        embedder, embedder_variables = tiny_bert(1)
        generator, generator_variables = tiny_decoder(2, lora=LoraConfig(rank=3, alpha=6.0))
        mixture = AnswerMixture(objective, score_scale=5.0)
        self.drawn = DrawnObjective(embedder, generator, mixture)
        self.trainable = {"embedder": embedder_variables, "generator": {"lora": generator_variables["lora"]}}
        self.frozen = {"generator": {"params": generator_variables["params"]}}
        self.examples = random_examples(5, seed=3)
        self.batch = jax.tree.map(lambda leaf: leaf[0, 0], stacked_batch(self.examples, 1, 1, SHAPE))
        scores = jax.jit(score_answers, static_argnums=0)(generator, generator_variables, self.batch.rows)
        parts = (self.batch.question_tokens, self.batch.question_lengths, self.batch.passage_vectors)
        self.scored = ScoredBatch(*parts, np.asarray(scores), self.batch.rows.answer_mask)
        self.exact = self.gradient(AnswerObjective(embedder, generator, mixture), self.batch)

    def gradient(self, objective, batch):
        """(gradient, sums) as numbers."""
        return jax.device_get(compiled_gradient(objective, self.trainable, self.frozen, batch, None))

    def through(self, drawn, weights):
        """(gradient, sums) with these passages [B, m] going backward."""
        chosen = [
            example._replace(prompts=[example.prompts[k] for k in places])
            for example, places in zip(self.examples, drawn, strict=True)
        ]
        rows = make_example_rows(place_examples(chosen, SHAPE.row_length), SHAPE, len(chosen))
        batch = DrawnBatch(self.scored, rows, np.asarray(drawn, np.int32), np.asarray(weights, np.float32))
        return self.gradient(self.drawn, batch)


def assert_same_gradient(got, expected, tolerance=1e-5):
    """Each leaf to its norm; the gradient of the key's bias is rounding noise."""
    largest = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(expected))
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        norm = largest if name.endswith("key/bias") else np.linalg.norm(other)
        assert norm > 0 and np.linalg.norm(one - other) <= tolerance * norm, name


@pytest.fixture(scope="module")
def networks():
    return Networks("rag_token")


def test_the_expected_gradient_is_the_exact_one(networks):
    """One passage of three goes backward: the embedder's gradient and the loss are exact whichever it is, and the
    generator's in the mean over the three.
    """
    (expected, sums), mean = networks.exact, 0.0
    for k, probability in enumerate((0.5, 0.3, 0.2)):
        got, own_sums = networks.through(np.full((5, 1), k), np.full((5, 1), 1 / probability))
        assert_same_gradient(got["embedder"], expected["embedder"])
        for name, value in sums.items():
            np.testing.assert_allclose(own_sums[name], value, rtol=1e-5, err_msg=name)
        mean = mean + probability * flatten(got["generator"])
    assert_same_gradient({"all": mean}, {"all": flatten(expected["generator"])})


def test_with_all_passages_drawn_it_is_the_exact_gradient(networks):
    """In whatever order they are drawn."""
    got, _ = networks.through([[2, 0, 1]] * 5, np.ones((5, 3)))
    assert_same_gradient(got, networks.exact[0])


def flatten(tree):
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


# --- the steps of a run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


def config_of(world, folder="unused", **flags) -> RunConfig:
    values = {"top_k": 5, "backward_passages": 2, "batch_size": 4, "max_passage_tokens": 24}
    return world.config(folder, **values | flags)


@pytest.fixture(scope="module")
def run(world):
    return prepare(config_of(world))


@pytest.fixture(scope="module")
def assembler(run):
    return JOINT.signal.make_assembler(run, JOINT.trains)


def test_a_step_holds_the_scores_of_all_passages_and_the_prompts_of_the_drawn(run, assembler):
    """Scores and prompts as plain code has them; what is drawn, and its weight, follow from them."""
    assert type(assembler) is DrawnAssembler
    asked, ledger = assembler.sampler.training_batch(1), Ledger()
    assembled = assembler.assemble(asked, placed(run), ledger)
    batch = jax.tree.map(lambda leaf: leaf[0, 0], assembled.batch)
    prompts = run.pipeline.prompts
    built, answers = [], [prompts.answer(question.answers[0]) for question in asked.questions]
    for question, answer, rows in zip(asked.questions, answers, assembled.passage_rows, strict=True):
        passages = run.pipeline.passages(rows)
        built += [prompts.prompt([passage], question.question, reserve=len(answer)).ids for passage in passages]
    expected = run.generator.score_tokens(built, [answer for answer in answers for _ in range(5)])
    vectors = run.embedder.encode_queries([question.question for question in asked.questions])
    passage_vectors = run.pipeline.retriever.vectors.vectors_of(assembled.passage_rows)
    reread = jax.jit(score_answers, static_argnums=0)(run.generator.module, run.generator.variables, batch.rows)
    for b, answer in enumerate(answers):
        length, drawn = len(answer), batch.drawn[b]
        scores = np.stack(expected[5 * b : 5 * b + 5])
        np.testing.assert_allclose(batch.scored.answer_log_probs[b, :, :length], scores, rtol=1e-5, atol=1e-5)
        assert batch.scored.answer_mask[b].sum() == length
        # The rows hold the prompts of the drawn passages, in their order.
        np.testing.assert_allclose(reread[b, :, :length], scores[drawn], rtol=1e-5, atol=1e-5)
        shares = answer_shares("rag_token", run.config.score_scale * passage_vectors[b] @ vectors[b], scores)
        draw = draw_passages(shares, 2, (run.config.seed, asked.step, asked.indices[b]))
        assert drawn.tolist() == draw.passages.tolist()
        np.testing.assert_allclose(batch.weights[b], draw.weights, rtol=1e-3)
    lengths = [len(ids) + len(answers[i // 5]) - 1 for i, ids in enumerate(built)]
    drawn = [5 * b + k for b in range(4) for k in batch.drawn[b]]
    size, head = run.generator.size, [len(answer) for answer in answers]
    read, learnt = ledger.part("generator"), assembled.work["generator"]
    assert read.flops == pytest.approx(forward_flops(size, lengths, 5 * sum(head)), rel=1e-12) and read.seconds > 0
    assert (read.tokens, read.backward_tokens) == (sum(lengths), 0)
    chosen = [lengths[i] for i in drawn]
    assert learnt.flops == pytest.approx(train_flops(size, chosen, 2 * sum(head)), rel=1e-12)
    assert learnt.tokens == learnt.backward_tokens == sum(chosen)
    assert assembled.figures["generator_tokens"] == sum(lengths)


def test_dev_questions_have_the_exact_loss(run, assembler):
    (asked,) = assembler.sampler.dev_batches(0)
    plain = dataclasses.replace(run, config=dataclasses.replace(run.config, backward_passages=0))
    found = []
    for one in (AnswerAssembler(plain, JOINT.trains), assembler):
        assembled = one.assemble(asked, placed(run), Ledger())
        batch = jax.tree.map(lambda leaf: leaf[0, 0], assembled.batch)
        sums = jax.jit(lambda *trees, own=one: summed_loss(own.objective, {}, *trees, None)[1])(placed(run), batch)
        found.append(jax.device_get(sums))
    assert found[0]["questions"] == 3
    assert set(found[0]) == set(found[1])
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5, err_msg=name)


def test_one_and_eight_devices_draw_the_same_and_have_the_same_gradient(world):
    one, eight = drawn_step(world, "rag_token"), on_eight_devices(world)
    np.testing.assert_array_equal(one.pop("drawn"), eight["drawn drawn"])
    np.testing.assert_allclose(one.pop("weights"), eight["drawn weights"], rtol=1e-4)
    gradients = {name: value for name, value in one.items() if name.startswith("gradient")}
    largest = max(np.linalg.norm(value) for value in gradients.values())
    for name, value in one.items():
        norm = largest if name.endswith("key/bias") else np.linalg.norm(value)
        assert norm > 0 or name.startswith("metric"), name
        assert np.linalg.norm(value - eight[f"drawn {name}"]) <= 1e-5 * norm, name


# --- flags


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"objective": "concat_nll", "strategy": "generator"}, "choose --objective=rag_token or rag_sequence"),
        ({"top_k": 2}, "--backward_passages=2 leaves out none of --top_k=2 passages: give a smaller number"),
        ({"top_k": 1}, "--backward_passages=2 leaves out none of --top_k=1 passages"),
        ({"lora_dropout": 0.1}, "which are not those of --lora_dropout=0.1: leave one of the two out."),
    ],
)
def test_what_it_does_not_go_with_is_refused(flags, sentence):
    with pytest.raises(UserError) as caught:
        phases_of(RunConfig(**{"strategy": "joint", "backward_passages": 2} | flags))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_where_no_generator_is_trained_it_is_refused_nothing():
    """The command says that it reads no such flag (`unread_flags`)."""
    assert phases_of(RunConfig(strategy="embedder", backward_passages=9)) == STRATEGIES["embedder"]
