"""The losses against float64 enumeration with plain loops, closed-form gradients and numbers worked by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ragjax import losses

MARGINALS = [losses.rag_token_nll, losses.rag_sequence_nll]
SHAPES = [(1, 1, 1), (1, 2, 3), (3, 5, 1), (4, 5, 7), (2, 8, 4), (5, 1, 6)]


def random_inputs(shape, seed=0):
    """Float32 (docs [B, K], answers [B, K, T], mask [B, T]); every question has an answer of at least one token."""
    questions, passages, tokens = shape
    rng = np.random.default_rng(seed)
    docs = np.log(rng.dirichlet(np.ones(passages), questions))
    answers = np.log(rng.uniform(0.001, 0.999, shape))
    mask = np.arange(tokens) < rng.integers(1, tokens + 1, questions)[:, None]
    return docs.astype(np.float32), answers.astype(np.float32), mask


def enumerated_rag_token(docs, answers, mask):
    """Probabilities, not logarithms, multiplied and added one by one in float64."""
    result = []
    for b in range(docs.shape[0]):
        likelihood = 1.0
        for t in range(answers.shape[2]):
            if mask[b, t]:
                token = 0.0
                for k in range(docs.shape[1]):
                    token += math.exp(float(docs[b, k])) * math.exp(float(answers[b, k, t]))
                likelihood *= token
        result.append(-math.log(likelihood))
    return np.array(result)


def enumerated_rag_sequence(docs, answers, mask):
    result = []
    for b in range(docs.shape[0]):
        likelihood = 0.0
        for k in range(docs.shape[1]):
            product = math.exp(float(docs[b, k]))
            for t in range(answers.shape[2]):
                if mask[b, t]:
                    product *= math.exp(float(answers[b, k, t]))
            likelihood += product
        result.append(-math.log(likelihood))
    return np.array(result)


ENUMERATED = {losses.rag_token_nll: enumerated_rag_token, losses.rag_sequence_nll: enumerated_rag_sequence}


def responsibilities(loss, docs, answers, mask):
    """Float64 posterior of the passages: [B, K, T], p(z | x, y_t) or, the same at every t, p(z | x, y)."""
    docs, answers = np.exp(docs.astype(np.float64)), np.exp(answers.astype(np.float64))
    result = np.zeros_like(answers)
    for b in range(docs.shape[0]):
        for t in np.flatnonzero(mask[b]):
            if loss is losses.rag_token_nll:
                joint = docs[b] * answers[b, :, t]
            else:
                joint = docs[b] * np.prod(answers[b][:, mask[b]], axis=1)
            result[b, :, t] = joint / joint.sum()
    return result


@functools.partial(jax.jit, static_argnums=0)
def gradients(loss, docs, answers, mask):
    """Of the summed loss, by docs and by answers."""
    return jax.grad(lambda d, a: loss(d, a, mask).sum(), argnums=(0, 1))(docs, answers)


@functools.partial(jax.jit, static_argnums=0)
def compiled(loss, docs, answers, mask):
    return loss(docs, answers, mask)


# --- values


def test_two_passages_and_two_tokens_by_hand():
    docs = np.log([[0.25, 0.75]])
    answers = np.log([[[0.5, 0.2], [0.1, 0.4]]])
    mask = np.ones((1, 2), bool)
    # (0.25 * 0.5 + 0.75 * 0.1) * (0.25 * 0.2 + 0.75 * 0.4) = 0.2 * 0.35
    np.testing.assert_allclose(losses.rag_token_nll(docs, answers, mask), [-math.log(0.07)], rtol=1e-6)
    # 0.25 * 0.5 * 0.2 + 0.75 * 0.1 * 0.4
    np.testing.assert_allclose(losses.rag_sequence_nll(docs, answers, mask), [-math.log(0.055)], rtol=1e-6)


@pytest.mark.parametrize("loss", MARGINALS)
@pytest.mark.parametrize("shape", SHAPES)
def test_marginal_losses_equal_enumeration(loss, shape):
    for seed in range(3):
        inputs = random_inputs(shape, seed)
        np.testing.assert_allclose(compiled(loss, *inputs), ENUMERATED[loss](*inputs), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("loss", MARGINALS)
def test_mask_with_gaps_counts_just_its_tokens(loss):
    docs, answers, _ = random_inputs((3, 4, 6), 5)
    mask = np.random.default_rng(6).random((3, 6)) < 0.5
    mask[:, 2] = True
    np.testing.assert_allclose(compiled(loss, docs, answers, mask), ENUMERATED[loss](docs, answers, mask), rtol=2e-6)


@pytest.mark.parametrize("loss", MARGINALS)
def test_one_passage_is_the_plain_nll(loss):
    _, answers, mask = random_inputs((6, 1, 5), 1)
    plain = [-sum(float(a) for a, m in zip(answers[b, 0], mask[b], strict=True) if m) for b in range(6)]
    np.testing.assert_allclose(compiled(loss, np.zeros((6, 1), np.float32), answers, mask), plain, rtol=1e-6)


@pytest.mark.parametrize("loss", MARGINALS)
def test_order_of_passages_does_not_matter(loss):
    docs, answers, mask = random_inputs((4, 6, 5), 2)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(6)
        np.testing.assert_allclose(
            compiled(loss, docs[:, order], answers[:, order], mask), compiled(loss, docs, answers, mask), rtol=1e-6
        )


@pytest.mark.parametrize("loss", MARGINALS)
def test_number_of_passages_may_change_from_call_to_call(loss):
    for passages in (5, 2, 9, 1):
        inputs = random_inputs((2, passages, 3), passages)
        np.testing.assert_allclose(compiled(loss, *inputs), ENUMERATED[loss](*inputs), rtol=2e-6)


def test_one_token_answers_have_one_value_and_keep_the_prior():
    """Without the end token (T = 1): both losses are -log sum_z p(z|x) p(y|x, z), so the prior cannot drop out."""
    docs, answers, mask = random_inputs((5, 4, 1), 3)
    expected = [
        -math.log(sum(math.exp(float(docs[b, k]) + float(answers[b, k, 0])) for k in range(4))) for b in range(5)
    ]
    for padding in (0, 3):
        padded = np.pad(answers, ((0, 0), (0, 0), (0, padding)), constant_values=-7.0)
        padded_mask = np.pad(mask, ((0, 0), (0, padding)))
        for loss in MARGINALS:
            np.testing.assert_allclose(compiled(loss, docs, padded, padded_mask), expected, rtol=1e-6)
            gradient, _ = gradients(loss, docs, padded, padded_mask)
            # Responsibilities sum to one: each question's prior is used exactly once.
            np.testing.assert_allclose(np.asarray(gradient).sum(axis=1), -np.ones(5), rtol=1e-5)


def test_one_token_and_a_certain_end_token_have_one_value():
    """With the end token: equal where every passage is sure of it, and by enumeration where none is."""
    docs, answers, _ = random_inputs((5, 4, 2), 4)
    answers[:, :, 1] = 0.0
    mask = np.ones((5, 2), bool)
    expected = [
        -math.log(sum(math.exp(float(docs[b, k]) + float(answers[b, k, 0])) for k in range(4))) for b in range(5)
    ]
    for loss in MARGINALS:
        np.testing.assert_allclose(compiled(loss, docs, answers, mask), expected, rtol=1e-5)
    answers = random_inputs((5, 4, 2), 4)[1]
    for loss in MARGINALS:
        np.testing.assert_allclose(
            compiled(loss, docs, answers, mask), ENUMERATED[loss](docs, answers, mask), rtol=2e-6
        )


@pytest.mark.parametrize("loss", MARGINALS)
def test_every_passage_counts(loss):
    """A sum over passages: raising any one passage's probability lowers the loss, by its responsibility."""
    docs, answers, mask = random_inputs((2, 5, 3), 8)
    base = np.asarray(compiled(loss, docs, answers, mask))
    for k in range(5):
        raised = answers.copy()
        raised[:, k] *= 0.5
        better = np.asarray(compiled(loss, docs, raised, mask))
        assert (better < base).all()
        np.testing.assert_allclose(better, ENUMERATED[loss](docs, raised, mask), rtol=2e-6)


# --- gradients


@pytest.mark.parametrize("loss", MARGINALS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_responsibilities(loss, shape):
    docs, answers, mask = random_inputs(shape, 11)
    by_docs, by_answers = gradients(loss, docs, answers, mask)
    share = responsibilities(loss, docs, answers, mask)
    np.testing.assert_allclose(by_answers, -share, rtol=1e-4, atol=1e-6)
    # RAG-Token draws a passage for each token, RAG-Sequence one for the answer.
    expected = share.sum(axis=2) if loss is losses.rag_token_nll else share.max(axis=2)
    np.testing.assert_allclose(by_docs, -expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", MARGINALS)
def test_question_vector_gets_the_closed_form_gradient(loss):
    """d loss / d x = -scale * sum_z (posterior - prior) * z, posterior and prior once per draw."""
    rng = np.random.default_rng(12)
    question, passages, scale = rng.normal(size=(3, 6)), rng.normal(size=(3, 4, 6)), 2.5
    _, answers, mask = random_inputs((3, 4, 5), 13)

    def value(question, passages):
        return loss(losses.doc_log_probs(question, passages, scale), answers, mask).sum()

    by_question, by_passages = jax.grad(value, argnums=(0, 1))(
        jnp.asarray(question, jnp.float32), jnp.asarray(passages, jnp.float32)
    )
    scores = scale * np.einsum("be,bke->bk", question, passages)
    prior = np.exp(scores - scores.max(axis=1, keepdims=True))
    prior /= prior.sum(axis=1, keepdims=True)
    share = responsibilities(loss, np.log(prior), answers, mask)
    if loss is losses.rag_token_nll:
        difference = share.sum(axis=2) - prior * mask.sum(axis=1, keepdims=True)
    else:
        difference = share.max(axis=2) - prior
    np.testing.assert_allclose(
        by_question, -scale * np.einsum("bk,bke->be", difference, passages), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(by_passages, -scale * difference[:, :, None] * question[:, None], rtol=1e-3, atol=1e-5)
    assert (np.abs(by_question) > 0).all()


@pytest.mark.parametrize("loss", MARGINALS)
def test_gradients_agree_with_finite_differences(loss):
    docs, answers, mask = random_inputs((2, 3, 4), 14)
    check_grads(jax.jit(lambda d, a: loss(d, a, mask).sum()), (docs, answers), order=1, atol=1e-2, rtol=1e-2, eps=1e-2)


def test_gradients_of_retrieval_losses_agree_with_finite_differences():
    rng = np.random.default_rng(15)
    question = rng.normal(size=(3, 4)).astype(np.float32)
    passages, pool = rng.normal(size=(3, 2, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    weights = rng.normal(size=(3, 2)).astype(np.float32)  # the plain sum of log-probabilities could hide an error

    def docs(question, passages):
        return (weights * losses.doc_log_probs(question, passages, 1.5)).sum()

    def ranking(question, pool):
        return losses.multiple_negatives_ranking_nll(question, pool, 1.5, labels=jnp.array([4, 0, 0])).sum()

    check_grads(jax.jit(docs), (question, passages), order=1, atol=1e-2, rtol=1e-2, eps=1e-2)
    check_grads(jax.jit(ranking), (question, pool), order=1, atol=1e-2, rtol=1e-2, eps=1e-2)


# --- what must not count


@pytest.mark.parametrize("loss", MARGINALS)
@pytest.mark.parametrize("junk", [np.nan, -np.inf, np.inf, 1e38])
def test_padding_is_never_seen(loss, junk):
    docs, answers, mask = random_inputs((4, 3, 6), 21)
    assert not mask.all()
    dirty = np.where(mask[:, None, :], answers, np.float32(junk))
    value, (by_docs, by_answers) = compiled(loss, docs, dirty, mask), gradients(loss, docs, dirty, mask)
    np.testing.assert_allclose(value, ENUMERATED[loss](docs, answers, mask), rtol=2e-6)
    assert np.isfinite(by_docs).all()
    clean = gradients(loss, docs, answers, mask)
    np.testing.assert_array_equal(by_docs, clean[0])
    np.testing.assert_array_equal(by_answers, clean[1])
    assert (np.asarray(by_answers)[~np.broadcast_to(mask[:, None, :], answers.shape)] == 0).all()


@pytest.mark.parametrize("loss", MARGINALS)
@pytest.mark.parametrize("junk", [np.nan, -np.inf])
def test_filler_questions_count_nowhere(loss, junk):
    docs, answers, mask = random_inputs((3, 4, 5), 22)
    mask[1] = False
    docs[1], answers[1] = junk, junk
    values = np.asarray(compiled(loss, docs, answers, mask))
    assert values[1] == 0.0
    np.testing.assert_allclose(values[[0, 2]], ENUMERATED[loss](docs[[0, 2]], answers[[0, 2]], mask[[0, 2]]), rtol=2e-6)
    by_docs, by_answers = gradients(loss, docs, answers, mask)
    assert (np.asarray(by_docs)[1] == 0).all() and (np.asarray(by_answers)[1] == 0).all()
    assert np.isfinite(by_docs).all() and np.isfinite(by_answers).all()
    assert (np.asarray(by_docs)[[0, 2]] < 0).all()


@pytest.mark.parametrize("loss", MARGINALS)
def test_extreme_values_stay_finite(loss):
    mask = np.ones((1, 3), bool)
    docs = np.array([[-1e4, -2e4, 0.0]], np.float32)
    answers = np.full((1, 3, 3), -1e4, np.float32)
    value, by_both = compiled(loss, docs, answers, mask), gradients(loss, docs, answers, mask)
    np.testing.assert_allclose(value, [3e4], rtol=1e-6)  # only the third passage has any weight left
    assert all(np.isfinite(gradient).all() for gradient in by_both)
    vectors = np.array([[1e3, -1e3]], np.float32), np.array([[[1e3, 0.0], [0.0, 1e3]]], np.float32)
    docs = losses.doc_log_probs(*vectors, 100.0)
    np.testing.assert_allclose(docs, [[0.0, -2e8]], rtol=1e-6)
    gradient = jax.grad(lambda q: loss(losses.doc_log_probs(q, vectors[1], 100.0), answers[:, :2], mask).sum())(
        vectors[0]
    )
    assert np.isfinite(gradient).all()
    assert np.isfinite(
        losses.multiple_negatives_ranking_nll(vectors[0], vectors[1][0], scale=100.0, labels=np.array([1]))
    ).all()


# --- doc_log_probs and multiple negatives ranking


def test_doc_log_probs_equal_float64():
    rng = np.random.default_rng(31)
    question, passages = rng.normal(size=(4, 8)).astype(np.float32), rng.normal(size=(4, 5, 8)).astype(np.float32)
    for scale in (0.0, 1.0, 20.0):
        expected = np.zeros((4, 5))
        for b in range(4):
            scores = [
                scale * sum(float(q) * float(z) for q, z in zip(question[b], row, strict=True)) for row in passages[b]
            ]
            highest = max(scores)
            total = math.log(sum(math.exp(score - highest) for score in scores)) + highest
            expected[b] = [score - total for score in scores]
        got = losses.doc_log_probs(question, passages, scale)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(np.exp(np.asarray(got, np.float64)).sum(axis=1), 1.0, rtol=1e-5)


def test_doc_log_probs_by_hand_and_without_normalising():
    question, passages = np.array([[2.0, 0.0]], np.float32), np.array([[[3.0, 5.0], [1.0, 7.0]]], np.float32)
    # inner products 6 and 2, scale 0.5: logits 3 and 1
    expected = [[-math.log1p(math.exp(-2)), -2 - math.log1p(math.exp(-2))]]
    np.testing.assert_allclose(losses.doc_log_probs(question, passages, 0.5), expected, rtol=1e-6)


def test_filler_vectors_give_a_uniform_distribution():
    np.testing.assert_allclose(
        losses.doc_log_probs(np.zeros((1, 4)), np.zeros((1, 5, 4)), 20.0), -math.log(5), rtol=1e-6
    )


def enumerated_ranking(question, pool, scale, labels, candidates):
    result = []
    for b in range(len(question)):
        scores = [scale * sum(float(x) * float(y) for x, y in zip(question[b], row, strict=True)) for row in pool]
        kept = [s for p, s in enumerate(scores) if p == labels[b] or candidates[b, p]]
        result.append(-scores[labels[b]] + max(kept) + math.log(sum(math.exp(s - max(kept)) for s in kept)))
    return np.array(result)


def test_ranking_equals_float64():
    rng = np.random.default_rng(41)
    question, pool = rng.normal(size=(4, 6)).astype(np.float32), rng.normal(size=(7, 6)).astype(np.float32)
    question /= np.linalg.norm(question, axis=1, keepdims=True)
    pool /= np.linalg.norm(pool, axis=1, keepdims=True)
    everything, diagonal = np.ones((4, 7), bool), np.arange(4)
    labels, candidates = np.array([6, 2, 2, 0]), rng.random((4, 7)) < 0.6
    nll = losses.multiple_negatives_ranking_nll
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(
        nll(question, pool), enumerated_ranking(question, pool, 20, diagonal, everything), **close
    )
    np.testing.assert_allclose(
        nll(question, pool, scale=3.0, labels=jnp.asarray(labels)),
        enumerated_ranking(question, pool, 3, labels, everything),
        **close,
    )
    np.testing.assert_allclose(
        nll(question, pool, scale=3.0, labels=labels, candidate_mask=candidates),
        enumerated_ranking(question, pool, 3, labels, candidates),
        **close,
    )


def test_ranking_by_hand():
    question, pool = np.eye(2, dtype=np.float32), np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)
    # logits (scale 2): row 0: 2, 2 with its positive first; row 1: 0, 2 with its positive second
    expected = [math.log(2), math.log1p(math.exp(-2))]
    np.testing.assert_allclose(losses.multiple_negatives_ranking_nll(question, pool, 2.0), expected, rtol=1e-6)


def test_positive_counts_even_where_the_mask_leaves_it_out():
    rng = np.random.default_rng(42)
    question, pool = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(3, 4)).astype(np.float32)
    nothing = np.zeros((3, 3), bool)
    value, gradient = jax.value_and_grad(
        lambda q: losses.multiple_negatives_ranking_nll(q, pool, candidate_mask=nothing).sum()
    )(question)
    np.testing.assert_allclose(value, 0.0, atol=1e-5)  # the only candidate is the positive: certain
    np.testing.assert_allclose(gradient, 0.0, atol=1e-4)
    mask = np.array([[False, True, False]] * 3)
    got = losses.multiple_negatives_ranking_nll(question, pool, 2.0, candidate_mask=mask)
    np.testing.assert_allclose(got, enumerated_ranking(question, pool, 2.0, np.arange(3), mask), rtol=1e-5, atol=1e-5)


def test_candidates_left_out_get_no_gradient():
    rng = np.random.default_rng(43)
    question, pool = rng.normal(size=(2, 4)).astype(np.float32), rng.normal(size=(4, 4)).astype(np.float32)
    mask = np.array([[True, True, False, True]] * 2)
    gradient = jax.grad(lambda p: losses.multiple_negatives_ranking_nll(question, p, 1.0, candidate_mask=mask).sum())(
        pool
    )
    assert (np.asarray(gradient)[2] == 0).all()
    assert np.isfinite(gradient).all() and (np.asarray(gradient)[[0, 1, 3]] != 0).all()


# --- dtypes and transformations


def test_output_is_float32_whatever_comes_in():
    docs, answers, mask = random_inputs((2, 3, 4), 51)
    half_docs, half_answers = jnp.asarray(docs, jnp.bfloat16), jnp.asarray(answers, jnp.bfloat16)
    for loss in MARGINALS:
        value = loss(half_docs, half_answers, mask)
        assert value.dtype == jnp.float32
        rounded = np.asarray(half_docs, np.float32), np.asarray(half_answers, np.float32)
        # Only the inputs are rounded: the sums run in float32.
        np.testing.assert_allclose(value, ENUMERATED[loss](*rounded, mask), rtol=2e-6)
    rng = np.random.default_rng(52)
    question, passages = rng.normal(size=(2, 64)), rng.normal(size=(2, 5, 64))
    half_question, half_passages = jnp.asarray(question, jnp.bfloat16), jnp.asarray(passages, jnp.bfloat16)
    docs = losses.doc_log_probs(half_question, half_passages, 1.0)
    assert docs.dtype == jnp.float32
    scores = np.einsum("be,bke->bk", np.asarray(half_question, np.float64), np.asarray(half_passages, np.float64))
    expected = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(docs, expected, rtol=1e-4, atol=1e-4)
    assert losses.multiple_negatives_ranking_nll(half_question, half_passages[0]).dtype == jnp.float32


@pytest.mark.parametrize("loss", MARGINALS)
def test_losses_compile_and_vectorise(loss):
    many = [random_inputs((3, 4, 5), seed) for seed in range(4)]
    stacked = [np.stack(parts) for parts in zip(*many, strict=True)]
    expected = np.stack([ENUMERATED[loss](*inputs) for inputs in many])
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(*stacked), expected, rtol=2e-6)


def test_retrieval_losses_compile_and_vectorise_over_the_scale():
    rng = np.random.default_rng(53)
    question, passages = rng.normal(size=(2, 4)).astype(np.float32), rng.normal(size=(2, 3, 4)).astype(np.float32)
    scales = np.array([0.5, 1.0, 4.0], np.float32)
    docs = jax.jit(jax.vmap(losses.doc_log_probs, in_axes=(None, None, 0)))(question, passages, scales)
    nll = jax.jit(jax.vmap(losses.multiple_negatives_ranking_nll, in_axes=(None, None, 0)))(
        question, passages[0], scales
    )
    for i, scale in enumerate(scales):
        np.testing.assert_allclose(
            docs[i], losses.doc_log_probs(question, passages, float(scale)), rtol=1e-5, atol=1e-6
        )
        everything = np.ones((2, 3), bool)
        expected = enumerated_ranking(question, passages[0], float(scale), np.arange(2), everything)
        np.testing.assert_allclose(nll[i], expected, rtol=1e-5, atol=1e-5)
