"""Answer scores against a direct loop over the logits of one prompt at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax import losses, scoring
from ragjax.data.batches import Shape, make_rows
from ragjax.scoring import score_answers
from tests.tiny_modules import random_examples, tiny_decoder

PACKED, UNPACKED = Shape(3, 64, 8), Shape(12, 32, 8)
END = 2


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def decoder(request):
    return tiny_decoder(tie_word_embeddings=request.param)


@functools.partial(jax.jit, static_argnums=0)
def full_logits(module, variables, tokens):
    positions = jnp.arange(tokens.shape[1])[None]
    return module.apply(variables, tokens, jnp.ones_like(tokens), positions, method="full_logits")


def direct_scores(decoder, prompt, answer):
    """Each answer token's log-probability from the text before it, one at a time, in float64."""
    module, variables = decoder
    scores = []
    for t, token in enumerate(answer):
        text = [*prompt, *answer[:t]]
        padded = np.zeros((1, 32), np.int32)  # what comes later cannot be seen
        padded[0, : len(text)] = text
        logits = np.asarray(full_logits(module, variables, padded), np.float64)[0, len(text) - 1]
        scores.append(logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
    return scores


def rows_of(examples, shape, size=None):
    prompts, answers = [e.prompts for e in examples], [e.answer for e in examples]
    return make_rows(prompts, answers, [e.index for e in examples], shape, size or len(examples))


compiled = jax.jit(score_answers, static_argnums=0)


def test_scores_equal_a_direct_loop(decoder):
    """Every token, the end token included, of answers of 1 to 4 tokens, several prompts sharing a row."""
    examples = random_examples(4)
    rows = rows_of(examples, PACKED, size=5)
    assert rows.segment_ids.max() > 2
    scores = np.asarray(compiled(*decoder, rows))
    assert scores.shape == (5, 3, 8) and scores.dtype == np.float32
    for b, example in enumerate(examples):
        assert rows.answer_mask[b].sum() == len(example.answer)
        for k, prompt in enumerate(example.prompts):
            expected = direct_scores(decoder, prompt, example.answer)
            np.testing.assert_allclose(scores[b, k, : len(expected)], expected, rtol=1e-4, atol=1e-5)
    assert not rows.answer_mask[4].any()


def test_packing_does_not_change_scores(decoder):
    examples = random_examples(4, seed=1)
    packed, unpacked = rows_of(examples, PACKED), rows_of(examples, UNPACKED)
    assert packed.segment_ids.max() > 2
    # With rows of 32 tokens hardly two prompts meet; give each a row of its own for certain.
    alone = [rows_of([e._replace(prompts=[prompt])], Shape(1, 32, 8)) for e in examples for prompt in e.prompts]
    expected = np.stack([np.asarray(compiled(*decoder, rows))[0, 0] for rows in alone]).reshape(4, 3, 8)
    mask = packed.answer_mask[:, None, :]
    for rows in (packed, unpacked):
        np.testing.assert_allclose(
            np.where(mask, compiled(*decoder, rows), 0), np.where(mask, expected, 0), rtol=1e-4, atol=1e-5
        )


def test_scores_in_chunks_equal_scores_at_once(decoder, monkeypatch):
    """More answer positions than HEAD_ROWS: same values, and same gradients through the recomputed chunks."""
    module, variables = decoder
    rows = rows_of(random_examples(4), PACKED)
    weights = np.where(rows.answer_mask[:, None, :], np.random.default_rng(0).normal(size=(4, 3, 8)), 0.0)

    def weighted(variables):
        scores = score_answers(module, variables, rows)
        return jnp.sum(weights * scores), scores

    assert weights.size < scoring.HEAD_ROWS
    (_, at_once), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(variables)
    monkeypatch.setattr(scoring, "HEAD_ROWS", 7)  # 96 positions: thirteen chunks and five over
    (_, chunked), chunked_gradient = jax.jit(jax.value_and_grad(lambda v: weighted(v), has_aux=True))(variables)
    np.testing.assert_allclose(chunked, at_once, rtol=1e-5, atol=1e-6)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(chunked_gradient), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * np.linalg.norm(one))


def test_logits_exist_for_answer_positions_only():
    """No array with a vocabulary axis has more rows than there are answer positions."""
    module, variables = tiny_decoder(vocab_size=67)
    rows = rows_of(random_examples(2), Shape(2, 64, 4))  # 24 answer positions, 128 token positions
    jaxpr = str(jax.make_jaxpr(lambda v: score_answers(module, v, rows))(variables))
    assert "f32[24,67]" in jaxpr
    assert "f32[2,64,67]" not in jaxpr and "f32[128,67]" not in jaxpr


def test_padding_may_be_the_end_token():
    """The mask comes from lengths: padding that holds the end token's id changes nothing, and the end is learned."""
    decoder = module, variables = tiny_decoder(3)
    examples = random_examples(3, end=END)
    rows = rows_of(examples, PACKED, size=4)
    as_end = rows._replace(
        tokens=np.where(rows.segment_ids == 0, END, rows.tokens),
        answer_tokens=np.where(rows.answer_mask, rows.answer_tokens, END),
    )
    assert (as_end.tokens == END).sum() > 50

    def nll(variables, rows):
        scores = score_answers(module, variables, rows)
        return losses.rag_token_nll(jnp.full((4, 3), -jnp.log(3.0)), scores, rows.answer_mask).sum(), scores

    (_, plain), gradient = jax.jit(jax.value_and_grad(nll, has_aux=True))(variables, rows)
    (_, scores), end_gradient = jax.jit(jax.value_and_grad(nll, has_aux=True))(variables, as_end)
    mask = rows.answer_mask[:, None, :]
    np.testing.assert_array_equal(np.where(mask, scores, 0), np.where(mask, plain, 0))
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(end_gradient), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6 * np.linalg.norm(one))
    for b, example in enumerate(examples):
        last = len(example.answer) - 1
        assert rows.answer_mask[b, last] and rows.answer_tokens[b, last] == END
        expected = direct_scores(decoder, example.prompts[0], example.answer)[last]
        np.testing.assert_allclose(scores[b, 0, last], expected, rtol=1e-4)


def test_an_end_token_inside_a_prompt_is_read():
    decoder = tiny_decoder(3)
    (example,) = random_examples(1, passages=1)
    prompt = list(example.prompts[0])
    prompt[1] = END
    scores = compiled(*decoder, rows_of([example._replace(prompts=[prompt])], Shape(1, 32, 8)))
    expected = direct_scores(decoder, prompt, example.answer)
    np.testing.assert_allclose(np.asarray(scores)[0, 0, : len(expected)], expected, rtol=1e-4, atol=1e-5)
    without = compiled(*decoder, rows_of([example._replace(prompts=[[prompt[0], *prompt[2:]]])], Shape(1, 32, 8)))
    assert abs(float(scores[0, 0, 0]) - float(without[0, 0, 0])) > 1e-3
