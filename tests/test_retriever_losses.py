"""The retriever's losses beyond the marginal likelihood, against float64 enumeration and closed-form gradients."""

import functools
import math

import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from ragjax import losses
from tests.test_losses import SHAPES, random_inputs

LOSSES = [losses.emdr2_nll, losses.perplexity_distillation_nll, losses.replug_lsr_nll, losses.leave_one_out_nll]
TEMPERATURES = [1.0, 0.3, 4.0]


def softmax(numbers):
    weights = [math.exp(number - max(numbers)) for number in numbers]
    return [weight / sum(weights) for weight in weights]


def enumerated(loss, docs, answers, mask, temperature):
    """Question by question and passage by passage, from the formulas of PDist, EMDR2, REPLUG LSR and LOOP."""
    result = []
    for b in range(docs.shape[0]):
        prior = [math.exp(float(d)) for d in docs[b]]
        log_likelihoods = [sum(float(a) for a, m in zip(row, mask[b], strict=True) if m) for row in answers[b]]
        likelihoods = [math.exp(number) for number in log_likelihoods]
        if loss is losses.emdr2_nll:
            mixed = sum(p * y ** (1 / temperature) for p, y in zip(prior, likelihoods, strict=True))
            result.append(-math.log(mixed))
        elif loss is losses.perplexity_distillation_nll:
            target = softmax([number / temperature for number in log_likelihoods])
            result.append(sum(q * math.log(q / p) for q, p in zip(target, prior, strict=True)))
        elif loss is losses.leave_one_out_nll:
            target = softmax([-number / temperature for number in log_likelihoods])
            result.append(sum(q * math.log(q / p) for q, p in zip(target, prior, strict=True)))
        else:
            target = softmax([y / temperature for y in likelihoods])
            result.append(sum(p * math.log(p / q) for q, p in zip(target, prior, strict=True)))
    return np.array(result)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(loss, docs, answers, mask, temperature):
    def summed(docs, answers):
        values = loss(docs, answers, mask, temperature)
        return values.sum(), values

    (_, values), found = jax.value_and_grad(summed, argnums=(0, 1), has_aux=True)(docs, answers)
    return values, found


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_equal_enumeration(loss, shape):
    for seed, temperature in enumerate(TEMPERATURES):
        inputs = random_inputs(shape, seed)
        values, _ = value_and_gradients(loss, *inputs, temperature)
        np.testing.assert_allclose(values, enumerated(loss, *inputs, temperature), rtol=5e-6, atol=2e-6)


def test_two_passages_by_hand():
    """Priors 1/4 and 3/4, likelihoods 0.1 and 0.04."""
    docs, mask = np.log([[0.25, 0.75]]), np.ones((1, 2), bool)
    answers = np.log([[[0.5, 0.2], [0.1, 0.4]]])
    np.testing.assert_allclose(losses.emdr2_nll(docs, answers, mask), [-math.log(0.055)], rtol=1e-6)
    # The target is 5/7 and 2/7.
    divergence = 5 / 7 * math.log(5 / 7 * 4) + 2 / 7 * math.log(2 / 7 * 4 / 3)
    np.testing.assert_allclose(losses.perplexity_distillation_nll(docs, answers, mask), [divergence], rtol=1e-6)
    # Without the first passage the answer has 0.1, without the second 0.04: the second matters more, 2/7 to 5/7.
    divergence = 2 / 7 * math.log(2 / 7 * 4) + 5 / 7 * math.log(5 / 7 * 4 / 3)
    # A small difference of float32 logarithms near 1.
    np.testing.assert_allclose(losses.leave_one_out_nll(docs, answers, mask), [divergence], rtol=0, atol=5e-8)
    # The target is 1 / (1 + e^-0.06) = 0.514996 and 0.485004.
    divergence = 0.25 * math.log(0.25 / 0.5149955) + 0.75 * math.log(0.75 / 0.4850045)
    np.testing.assert_allclose(losses.replug_lsr_nll(docs, answers, mask), [divergence], rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_gradient_reaches_the_generator(loss):
    _, (by_docs, by_answers) = value_and_gradients(loss, *random_inputs((3, 4, 5)), 0.7)
    assert np.abs(by_docs).min() > 0
    assert not np.any(by_answers)


def test_emdr2_is_rag_sequence_to_the_retriever():
    docs, answers, mask = random_inputs((4, 5, 6), 2)
    values, (by_docs, _) = value_and_gradients(losses.emdr2_nll, docs, answers, mask, 1.0)
    np.testing.assert_array_equal(values, losses.rag_sequence_nll(docs, answers, mask))
    expected = jax.grad(lambda d: losses.rag_sequence_nll(d, answers, mask).sum())(docs)
    np.testing.assert_allclose(by_docs, expected, rtol=1e-6)


def test_distillations_gradient_is_prior_less_target():
    """By the retrieval scores before the softmax, the cross-entropy's gradient is p - q."""
    docs, answers, mask = random_inputs((4, 5, 3), 3)
    nll = losses.perplexity_distillation_nll
    by_scores = jax.grad(lambda s: nll(jax.nn.log_softmax(s), answers, mask, 2.0).sum())(docs)
    target = np.array([softmax(row) for row in np.where(mask[:, None], answers, 0).sum(-1) / 2.0])
    np.testing.assert_allclose(by_scores, np.exp(docs) - target, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_agree_with_finite_differences(loss):
    docs, answers, mask = random_inputs((2, 4, 3), 4)
    check_grads(lambda d: loss(jax.nn.log_softmax(d), answers, mask, 0.8), (docs,), order=1, modes=["rev"], rtol=1e-2)


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_a_retriever_that_agrees_has_no_loss(loss):
    _, answers, mask = random_inputs((3, 4, 2), 5)
    likelihoods = np.where(mask[:, None], answers, 0).sum(-1)
    agreeing = {losses.perplexity_distillation_nll: likelihoods, losses.leave_one_out_nll: -likelihoods}
    scores = agreeing.get(loss, np.exp(likelihoods))
    values, (by_docs, _) = value_and_gradients(loss, np.asarray(jax.nn.log_softmax(scores)), answers, mask, 1.0)
    np.testing.assert_allclose(values, 0, atol=1e-6)
    by_scores = jax.grad(lambda s: loss(jax.nn.log_softmax(s), answers, mask).sum())(scores)
    np.testing.assert_allclose(by_scores, 0, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("junk", [np.nan, -np.inf, 1e38])
def test_padding_and_filler_are_never_seen(loss, junk):
    docs, answers, mask = random_inputs((3, 4, 5), 6)
    mask[1], mask[0, -1] = False, False
    expected, (expected_gradient, _) = value_and_gradients(loss, docs, answers, mask, 1.0)
    dirty_answers = np.where(mask[:, None], answers, junk).astype(np.float32)
    dirty_docs = np.where(mask.any(-1)[:, None], docs, junk).astype(np.float32)
    values, (by_docs, by_answers) = value_and_gradients(loss, dirty_docs, dirty_answers, mask, 1.0)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(by_docs, expected_gradient)
    assert values[1] == 0 and not np.any(by_docs[1]) and not np.any(by_answers)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_impossible_passage_or_answer_stays_finite(loss):
    """A passage of probability 0 that the target does not want either, and an answer of 2,000 nats."""
    docs = np.log(np.array([[0.5, 0.5, 1e-30], [0.2, 0.3, 0.5]], np.float32))
    if loss not in (losses.perplexity_distillation_nll, losses.leave_one_out_nll):  # no finite loss reaches those
        docs[0, 2] = -np.inf
    answers = np.array([[[-1.0], [-2.0], [-2000.0]], [[-2000.0], [-1990.0], [-1980.0]]], np.float32)
    values, (by_docs, _) = value_and_gradients(loss, docs, answers, np.ones((2, 1), bool), 1.0)
    assert np.isfinite(values).all() and np.isfinite(by_docs).all()
