"""The training step: its loss and gradients, the split over devices and micro-batches, schedule and AdamW by hand."""

import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ragjax.checkpoints import Checkpoints
from ragjax.config import RunConfig
from ragjax.data.batches import Shape
from ragjax.models.encoders import sentence_vectors
from ragjax.models.lora import LoraConfig
from ragjax.parallel import ONE_DEVICE, Replicated
from ragjax.scoring import score_answers
from ragjax.training.loop import split_trainable
from ragjax.training.state import apply_gradients, init_state, keep_finite, linear_schedule, make_optimizer
from ragjax.training.step import make_eval_step, make_train_step, means, summed_loss
from ragjax.training.strategies import STRATEGIES
from tests.tiny_modules import random_examples, stacked_batch, tiny_objective
from tests.tiny_runs import run_of
from tests.training.cases import CASES, examples_of, objective_of, split

pytestmark = pytest.mark.slow

SHAPE = Shape(15, 64, 8)
RATES = {"embedder": 0.01, "generator": 0.02}


def identity() -> optax.GradientTransformation:
    """Passes gradients through and keeps the last ones as its state."""
    return optax.GradientTransformation(
        init=lambda params: jax.tree.map(np.zeros_like, params), update=lambda gradients, *_: (gradients, gradients)
    )


def one_step(case, examples, accumulation=1, reduction=None, steps=4):
    """(old trainable, new state, metrics) of one SGD step on one device."""
    objective, variables = objective_of(case)
    trainable, frozen = split(case, variables)
    make = make_train_step(objective, identity(), steps, 0.0, reduction or CASES[case]["reduction"], seed=3)
    batch = jax.tree.map(lambda leaf: leaf[0], stacked_batch(examples, 1, accumulation, SHAPE))
    state, metrics = jax.jit(make(ONE_DEVICE))(init_state(trainable, RATES, identity()), frozen, batch)
    return trainable, state, jax.device_get(metrics)


def assert_trees_close(got, expected, tolerance):
    """Each leaf to `tolerance` of its norm; leaves whose gradient is rounding noise, of the largest leaf's norm."""
    largest = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(expected))
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, one), other in pairs:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        norm = largest if is_key_bias(name) else np.linalg.norm(other)
        assert np.linalg.norm(np.asarray(one) - np.asarray(other)) <= tolerance * norm, name


def is_key_bias(name: str) -> bool:
    """A bias on all keys adds the same to every score of a query, and softmax does not see it: gradient 0."""
    return name.endswith("self/key/bias")


# --- the loss


@pytest.mark.parametrize(("case", "reduction"), [("rag_token_mean", "sum"), ("rag_token_mean", "mean")])
def test_loss_is_the_questions_nll_over_an_explicit_count(case, reduction):
    """Against the models called by hand: vectors and scores, then probabilities multiplied out in float64."""
    objective, variables = objective_of(case)
    examples = examples_of(case, seed=5)
    batch = jax.tree.map(lambda leaf: leaf[0, 0], stacked_batch(examples, 1, 1, SHAPE))
    vectors = np.asarray(
        jax.jit(sentence_vectors, static_argnums=0)(
            objective.embedder, variables["embedder"], batch.question_tokens, batch.question_lengths
        ),
        np.float64,
    )
    scores = jax.jit(score_answers, static_argnums=0)(objective.generator, variables["generator"], batch.rows)
    likelihoods, total = np.exp(np.asarray(scores, np.float64)), 0.0
    for b, example in enumerate(examples):
        prior = np.exp(5.0 * example.passage_vectors.astype(np.float64) @ vectors[b])
        prior /= prior.sum()
        for t in range(len(example.answer)):
            total -= math.log(sum(prior[k] * likelihoods[b, k, t] for k in range(3)))
    tokens = sum(len(example.answer) for example in examples)
    _, _, metrics = one_step(case, examples, reduction=reduction)
    np.testing.assert_allclose(metrics["loss"], total / (tokens if reduction == "mean" else 5), rtol=1e-5)
    np.testing.assert_allclose(metrics["nll_per_answer"], total / 5, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll_per_token"], total / tokens, rtol=1e-5)
    assert (metrics["questions"], metrics["answer_tokens"]) == (5, tokens)


def test_concatenated_prompts_have_the_plain_nll():
    objective, variables = objective_of("concat_nll")
    examples = examples_of("concat_nll", seed=6)
    batch = jax.tree.map(lambda leaf: leaf[0, 0], stacked_batch(examples, 1, 1, SHAPE))
    trainable, frozen = split("concat_nll", variables)
    total, sums = jax.jit(summed_loss, static_argnums=0)(objective, trainable, frozen, batch, None)
    scores = jax.jit(score_answers, static_argnums=0)(objective.generator, variables["generator"], batch.rows)
    expected = -sum(float(scores[b, 0, t]) for b, e in enumerate(examples) for t in range(len(e.answer)))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert "retrieval_entropy" not in sums


# --- gradients


@pytest.mark.parametrize("name", ["rag_token", "rag_sequence"])
def test_every_embedder_parameter_that_pooling_uses_gets_a_gradient(name):
    """The question vector is live: each parameter's gradient is finite and not zero, key biases excepted."""
    objective, variables = tiny_objective(name, lora=LoraConfig(rank=3))
    fresh = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.zeros_like(leaf) if path[-1].key == "lora_b" else leaf, variables["generator"]["lora"]
    )
    trainable = {"embedder": variables["embedder"], "generator": {"lora": fresh}}
    frozen = {"generator": {"params": variables["generator"]["params"]}}
    batch = jax.tree.map(lambda leaf: leaf[0, 0], stacked_batch(random_examples(5, 7), 1, 1, SHAPE))
    gradient, _ = jax.jit(jax.grad(summed_loss, argnums=1, has_aux=True), static_argnums=0)(
        objective, trainable, frozen, batch, None
    )
    assert set(gradient) == {"embedder", "generator"} and set(gradient["generator"]) == {"lora"}
    layered = {"encoder"}  # a leading layer axis: every layer must get its own
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient["embedder"]["params"]):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.isfinite(leaf).all(), name
        for layer in leaf if path[0].key in layered else [leaf]:
            assert is_key_bias(name) or np.linalg.norm(layer) > 1e-6, name
    words = np.asarray(gradient["embedder"]["params"]["embeddings"]["word_embeddings"]["embedding"])
    asked = {token for example in random_examples(5, 7) for token in example.question_tokens}
    assert set(np.flatnonzero(np.abs(words).sum(axis=1)).tolist()) == asked
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient["generator"]):
        # B = 0 at the start: A's gradient passes through it and is zero, B's is not.
        assert np.isfinite(leaf).all()
        assert (np.linalg.norm(leaf) > 0) == (path[-1].key == "lora_b")


def test_fillers_change_nothing():
    """Five questions in a batch of five and of nine, and one whose other seats are empty: same gradients."""
    case, examples = "rag_sequence", examples_of("rag_sequence", seed=8)
    objective, variables = objective_of(case)
    trainable, frozen = split(case, variables)
    gradient = jax.jit(jax.grad(summed_loss, argnums=1, has_aux=True), static_argnums=0)
    exact = jax.tree.map(lambda leaf: leaf[0, 0], stacked_batch(examples, 1, 1, SHAPE))

    def widened(leaf):
        return np.concatenate([leaf, np.zeros((4, *leaf.shape[1:]), leaf.dtype)])

    wide = exact._replace(
        question_tokens=widened(exact.question_tokens),
        question_lengths=widened(exact.question_lengths),
        passage_vectors=widened(exact.passage_vectors),
        rows=exact.rows._replace(
            answer_index=widened(exact.rows.answer_index),
            answer_tokens=widened(exact.rows.answer_tokens),
            answer_mask=widened(exact.rows.answer_mask),
        ),
    )
    expected, sums = gradient(objective, trainable, frozen, exact, None)
    got, wide_sums = gradient(objective, trainable, frozen, wide, None)
    assert_trees_close(got, expected, 1e-5)
    for name, value in sums.items():
        np.testing.assert_allclose(wide_sums[name], value, rtol=1e-5)
    nothing = jax.tree.map(np.zeros_like, exact)
    zero, sums = gradient(objective, trainable, frozen, nothing, None)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(zero))
    assert all(float(value) == 0 for value in sums.values())


@pytest.mark.parametrize("case", ["rag_token", "rag_sequence"])
def test_micro_batches_add_up(case):
    """One micro-batch of five questions, or three of two (the last with a filler)."""
    examples = examples_of(case, seed=9)
    _, whole, metrics = one_step(case, examples)
    _, parts, part_metrics = one_step(case, examples, accumulation=3)
    assert_trees_close(parts.optimizer, whole.optimizer, 1e-5)
    assert_trees_close(parts.trainable, whole.trainable, 1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(part_metrics[name], value, rtol=1e-4, err_msg=name)


def test_mean_and_sum_differ_by_one_count():
    examples = examples_of("rag_token_mean", seed=10)
    tokens = sum(len(example.answer) for example in examples)
    _, by_sum, _ = one_step("rag_token_mean", examples, reduction="sum")
    _, by_mean, _ = one_step("rag_token_mean", examples, reduction="mean")
    scaled = jax.tree.map(lambda leaf: leaf * (5 / tokens), by_sum.optimizer)
    assert_trees_close(by_mean.optimizer, scaled, 1e-5)


def test_eval_step_adds_up_what_the_train_step_averages():
    case = "rag_token_mean"
    objective, variables = objective_of(case)
    trainable, frozen = split(case, variables)
    examples = examples_of(case, seed=11)
    batch = jax.tree.map(lambda leaf: leaf[0], stacked_batch(examples, 1, 3, SHAPE))
    sums = jax.jit(make_eval_step(objective)(ONE_DEVICE))(trainable, frozen, batch)
    _, _, metrics = one_step(case, examples)
    figures = means(jax.device_get(sums))
    # A step's own loss is reduced as the flag says, here over the answer tokens; what is compared is per question.
    np.testing.assert_allclose(metrics["loss"], metrics["nll_per_token"], rtol=1e-6)
    np.testing.assert_allclose(figures.pop("loss"), metrics["nll_per_answer"], rtol=1e-4)
    for name, value in figures.items():
        np.testing.assert_allclose(value, metrics[name], rtol=1e-4, err_msg=name)


# --- 1 and 8 devices


@pytest.fixture(scope="module")
def worker(tmp_path_factory) -> Path:
    """The folder of what was computed in a process that has 8 virtual CPU devices."""
    folder = tmp_path_factory.mktemp("devices")
    # Nearly all of its time is compiling, and what is compared does not depend on how well that optimises.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {quick} --xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.training.devices_worker", str(folder / "results.npz")],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        check=True,
        timeout=900,
    )
    return folder


@pytest.fixture(scope="module")
def on_devices(worker) -> dict[str, np.ndarray]:
    """Every case on 1 and on 8 devices."""
    with np.load(worker / "results.npz") as results:
        return dict(results)


@pytest.mark.parametrize("case", CASES)
def test_one_and_eight_devices_agree(case, on_devices):
    """Reduced gradients to 1e-5 of each leaf's norm, and the parameters after three steps of SGD."""
    start = f"{case} 1 "
    names = [name.removeprefix(start) for name in on_devices if name.startswith(start)]
    kinds = {name.split()[0] for name in names}
    assert kinds == {"gradient", "parameter", "metric"}
    gradients = [name for name in names if name.startswith("gradient")]
    assert any("embedder" in name for name in gradients) == (case != "concat_nll")
    largest = max(np.linalg.norm(on_devices[start + name]) for name in gradients)
    for name in names:
        one, eight = on_devices[start + name], on_devices[f"{case} 8 {name}"]
        norm = largest if is_key_bias(name) and name in gradients else np.linalg.norm(one)
        assert norm > 0 or name.startswith("metric"), name
        assert np.linalg.norm(one - eight) <= 1e-5 * norm, name


def test_a_checkpoint_of_eight_devices_is_restored_on_one(worker, on_devices):
    """From a template that knows no devices, bit for bit; and a step goes on from it."""
    case = next(iter(CASES))
    objective, variables = objective_of(case)
    trainable, frozen = split(case, variables)
    state = init_state(trainable, RATES, identity())
    templates = {"trainable": state.trainable, "optimizer": state.optimizer}
    number, trees, _ = Checkpoints(worker / "checkpoints").restore(templates)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees["trainable"]):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_array_equal(leaf, on_devices[f"{case} 8 parameter {name}"], strict=True)
    devices = jax.local_devices()[:1]
    one = Replicated(devices)
    placed = one.place(state._replace(step=jnp.int32(number), **trees), donated=True)
    step = one.compile_step(make_train_step(objective, identity(), 4, 0.0, "sum", seed=3))
    after, _ = step(placed, one.place(frozen), stacked_batch(examples_of(case, number), 1, 1, SHAPE))
    assert int(after.step) == number + 1
    assert all(leaf.sharding.device_set == set(devices) for leaf in jax.tree.leaves(after.trainable))


# --- donation and what is trained


def test_the_state_is_donated():
    case = "rag_token_mean"
    objective, variables = objective_of(case)
    trainable, frozen = split(case, variables)
    optimizer = make_optimizer(1.0, 0.0)
    device = Replicated(jax.local_devices()[:1])
    step = device.compile_step(make_train_step(objective, optimizer, 4, 0.0, "sum", 0))
    state = device.place(init_state(trainable, RATES, optimizer), donated=True)
    frozen = device.place(frozen)
    batch = stacked_batch(examples_of(case, 12), 1, 1, SHAPE)
    new, _ = step(state, frozen, batch)  # a donated buffer that found no use would be a warning, which is an error
    moved = jax.tree.leaves((state.trainable, state.optimizer))
    assert moved and all(leaf.is_deleted() for leaf in moved)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, frozen)))
    assert int(new.step) == 1


def test_generator_strategy_leaves_the_embedder_frozen():
    (phase,) = STRATEGIES["generator"]
    objective, variables = objective_of("rag_token_mean")
    models = SimpleNamespace(variables=variables)

    def split_of(phase, **flags):
        return split_trainable(run_of(RunConfig(**flags), models, None), phase)

    trainable, frozen = split_of(phase, strategy="generator")
    assert {name: set(tree) for name, tree in trainable.items()} == {"generator": {"lora"}}
    assert {name: set(tree) for name, tree in frozen.items()} == {"embedder": {"params"}, "generator": {"params"}}
    full, rest = split_of(phase, strategy="generator", lora_rank=0)
    assert set(full["generator"]) == {"params"} and "embedder" not in full and set(rest["embedder"]) == {"params"}
    (joint,) = STRATEGIES["joint"]
    both, _ = split_of(joint)
    assert {name: set(tree) for name, tree in both.items()} == {"embedder": {"params"}, "generator": {"lora"}}
    state = init_state(trainable, RATES, make_optimizer(1.0, 0.0))
    assert set(state.trainable) == set(state.optimizer) == set(state.learning_rates) == {"generator"}


# --- schedule and optimizer


def test_schedule_by_hand():
    """Ten steps, two of them warm-up: up to the peak at the second, then down by a ninth each, to 0 after the last."""
    expected = [1 / 2, 1, 8 / 9, 7 / 9, 6 / 9, 5 / 9, 4 / 9, 3 / 9, 2 / 9, 1 / 9]
    got = [float(linear_schedule(jnp.int32(step), 10, 0.2)) for step in range(10)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert float(linear_schedule(jnp.int32(10), 10, 0.2)) == 0.0


def test_schedule_of_short_runs():
    assert float(linear_schedule(jnp.int32(0), 1, 0.05)) == 1.0
    np.testing.assert_allclose([float(linear_schedule(jnp.int32(s), 3, 0.0)) for s in range(3)], [1, 2 / 3, 1 / 3])
    everything = [float(linear_schedule(jnp.int32(step), 4, 1.0)) for step in range(4)]
    np.testing.assert_allclose(everything, [1 / 4, 2 / 4, 3 / 4, 1.0])


def test_adamw_by_hand():
    """A scalar through three steps: clipping at 1, moments with bias correction, decoupled decay, rate * factor."""
    decay, rate, factors, gradients = 0.1, 0.01, (0.5, 1.0, 0.25), (0.5, -3.0, 0.2)
    optimizer = make_optimizer(max_grad_norm=1.0, weight_decay=decay)
    state = init_state({"generator": {"w": jnp.float32(2.0)}}, {"generator": rate}, optimizer)
    update = jax.jit(functools.partial(apply_gradients, optimizer=optimizer))
    weight, mean, square = 2.0, 0.0, 0.0
    for number, (factor, gradient) in enumerate(zip(factors, gradients, strict=True), start=1):
        state = update(state, {"generator": {"w": jnp.float32(gradient)}}, factor=jnp.float32(factor))
        clipped = gradient / max(1.0, abs(gradient))
        mean, square = 0.9 * mean + 0.1 * clipped, 0.999 * square + 0.001 * clipped**2
        moved = (mean / (1 - 0.9**number)) / (math.sqrt(square / (1 - 0.999**number)) + 1e-8)
        weight -= rate * factor * (moved + decay * weight)
        np.testing.assert_allclose(float(state.trainable["generator"]["w"]), weight, rtol=2e-6)
        assert int(state.step) == number
    # The first step alone: the gradient's sign, and 0.1 * 2 of decay, times 0.01 * 0.5.
    assert pytest.approx(1.994) == 2.0 - 0.005 * 1.2


def test_each_model_has_its_own_clipping_and_rate():
    optimizer = make_optimizer(max_grad_norm=1.0, weight_decay=0.0)
    trees = {"embedder": {"w": jnp.zeros(2)}, "generator": {"w": jnp.zeros(2)}}
    state = init_state(trees, {"embedder": 0.1, "generator": 0.2}, optimizer)
    gradients = {"embedder": {"w": jnp.array([3e6, 4e6])}, "generator": {"w": jnp.array([0.3, 0.4])}}
    new = jax.jit(functools.partial(apply_gradients, optimizer=optimizer))(state, gradients, factor=jnp.float32(1.0))
    # Adam's first moment: a tenth of the clipped gradient. A norm over both models would crush the second one.
    np.testing.assert_allclose(new.optimizer["embedder"][1].mu["w"], [0.06, 0.08], rtol=1e-5)
    np.testing.assert_allclose(new.optimizer["generator"][1].mu["w"], [0.03, 0.04], rtol=1e-5)
    np.testing.assert_allclose(new.trainable["embedder"]["w"], [-0.1, -0.1], rtol=1e-5)
    np.testing.assert_allclose(new.trainable["generator"]["w"], [-0.2, -0.2], rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_but_its_number():
    """Bit for bit, and so the step after it is the one that comes without it."""
    case, optimizer = "rag_token_mean", make_optimizer(1.0, 0.01)
    objective, variables = objective_of(case)
    trainable, frozen = split(case, variables)
    step = jax.jit(make_train_step(objective, optimizer, 4, 0.0, "sum", seed=3)(ONE_DEVICE))

    def batch(seed):
        return jax.tree.map(lambda leaf: leaf[0], stacked_batch(examples_of(case, seed), 1, 1, SHAPE))

    first, _ = step(init_state(trainable, RATES, optimizer), frozen, batch(1))
    bad = batch(2)
    bad.passage_vectors[0, 1, 2, 0] = math.nan  # one number of one question
    passed_over, metrics = step(first, frozen, bad)
    assert metrics["skipped"] == 1 and passed_over.step == 2
    assert not math.isfinite(metrics["loss"])
    assert_same_bits(passed_over._replace(step=first.step), first)
    after, metrics = step(passed_over, frozen, batch(3))
    without, _ = step(first._replace(step=passed_over.step), frozen, batch(3))
    assert metrics["skipped"] == 0
    assert_same_bits(after, without)
    assert float(optax.tree.norm(optax.tree.sub(after.trainable, first.trainable))) > 0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_figure_that_is_not_finite_is_enough(bad):
    """A gradient's norm, say; of stacked copies the others are updated."""
    optimizer = make_optimizer(1.0, 0.0)
    state = init_state({"embedder": {"w": jnp.float32(1.0)}}, {"embedder": 0.1}, optimizer)
    updated = apply_gradients(state, {"embedder": {"w": jnp.float32(1.0)}}, optimizer, jnp.float32(1.0))
    kept, skipped = jax.vmap(lambda norm: keep_finite(updated, state, [jnp.float32(2.0), norm]))(jnp.array([3.0, bad]))
    assert skipped.tolist() == [False, True]
    assert_same_bits(jax.tree.map(lambda leaf: leaf[0], kept), updated)
    assert_same_bits(jax.tree.map(lambda leaf: leaf[1], kept), state._replace(step=updated.step))


def assert_same_bits(one, other):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


def test_states_that_differ_in_rates_alone_can_be_stacked():
    """Learning rates are array leaves: a grid of them is one `vmap`."""
    optimizer = make_optimizer(1.0, 0.0)
    rates = np.array([0.1, 0.3], np.float32)
    state = init_state({"embedder": {"w": jnp.float32(1.0)}}, {"embedder": 0.0}, optimizer)
    grid = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)._replace(learning_rates={"embedder": rates})
    gradient = {"embedder": {"w": jnp.ones(2)}}
    new = jax.vmap(lambda s, g: apply_gradients(s, g, optimizer, jnp.float32(1.0)))(grid, gradient)
    np.testing.assert_allclose(new.trainable["embedder"]["w"], 1.0 - rates, rtol=1e-5)


def test_dropout_draws_anew_each_step_and_the_same_again():
    """The key folds in the step, so that a resumed run repeats it."""
    case, examples = "rag_token", examples_of("rag_token", seed=13)
    objective, variables = objective_of(case)
    trainable, frozen = split(case, variables)
    batch = jax.tree.map(lambda leaf: leaf[0], stacked_batch(examples, 1, 1, SHAPE))
    step = jax.jit(make_train_step(objective, identity(), 4, 0.0, "sum", seed=3)(ONE_DEVICE))
    state = init_state(trainable, RATES, identity())
    first = float(step(state, frozen, batch)[1]["loss"])
    assert float(step(state, frozen, batch)[1]["loss"]) == first
    later = state._replace(step=jnp.int32(1))
    assert abs(float(step(later, frozen, batch)[1]["loss"]) - first) > 1e-4
