"""The sentence encoder against a float64 reference, and its pooling: padding, fillers, unit length."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.errors import UserError
from ragjax.models.bert import BertConfig
from ragjax.models.encoders import sentence_vectors
from tests.tiny_modules import BERT, tiny_bert

LENGTHS = np.array([6, 3, 1, 0], np.int32)


def reference_states(config: BertConfig, params, tokens) -> np.ndarray:
    """States [S, D] of one unpadded text in float64, one head at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    erf = np.vectorize(math.erf)

    def norm(x, weights):
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + config.layer_norm_eps)
        return centred / deviation * weights["scale"] + weights["bias"]

    def dense(x, weights):
        return x @ weights["kernel"] + weights["bias"]

    tables = {name: part["embedding"] for name, part in params["embeddings"].items() if name != "LayerNorm"}
    x = tables["word_embeddings"][tokens] + tables["position_embeddings"][: len(tokens)]
    x = norm(x + tables["token_type_embeddings"][0], params["embeddings"]["LayerNorm"])
    width = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        weights = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["encoder"]["layer"])
        heads = []
        for head in range(config.num_attention_heads):
            part = slice(head * width, (head + 1) * width)
            query, key, value = (
                dense(x, weights["attention"]["self"][name])[:, part] for name in ("query", "key", "value")
            )
            scores = np.exp(query @ key.T / math.sqrt(width))
            heads.append(scores / scores.sum(axis=1, keepdims=True) @ value)
        output = weights["attention"]["output"]
        x = norm(x + dense(np.concatenate(heads, axis=1), output["dense"]), output["LayerNorm"])
        inner = dense(x, weights["intermediate"]["dense"])
        inner = inner * 0.5 * (1 + erf(inner / math.sqrt(2)))
        x = norm(x + dense(inner, weights["output"]["dense"]), weights["output"]["LayerNorm"])
    return x


@pytest.fixture(scope="module")
def bert():
    return tiny_bert()


@functools.partial(jax.jit, static_argnums=0)
def vectors_of(module, variables, tokens, lengths):
    return sentence_vectors(module, variables, tokens, lengths)


def random_tokens(width, seed=0):
    return np.random.default_rng(seed).integers(0, BERT["vocab_size"], (len(LENGTHS), width)).astype(np.int32)


def test_vectors_equal_the_reference(bert):
    """The mean over the real tokens' states, scaled to length one; junk behind the text is not seen."""
    module, variables = bert
    tokens = random_tokens(8)
    vectors = np.asarray(vectors_of(module, variables, tokens, LENGTHS))
    assert vectors.shape == (4, 16) and vectors.dtype == np.float32
    for row, length in enumerate(LENGTHS[:3]):
        mean = reference_states(module.config, variables["params"], tokens[row, :length]).mean(axis=0)
        np.testing.assert_allclose(vectors[row], mean / np.linalg.norm(mean), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors[:3], axis=1), 1.0, rtol=1e-6)


def test_vectors_do_not_depend_on_padding(bert):
    module, variables = bert
    narrow = vectors_of(module, variables, random_tokens(8), LENGTHS)
    wide = random_tokens(16, seed=1)
    wide[:, :8] = np.where(np.arange(8) < LENGTHS[:, None], random_tokens(8), wide[:, :8])
    np.testing.assert_allclose(vectors_of(module, variables, wide, LENGTHS), narrow, atol=1e-6)


def test_a_filler_row_is_the_zero_vector_and_harmless(bert):
    module, variables = bert
    tokens, weights = random_tokens(8), np.random.default_rng(2).normal(size=(4, 16))

    @jax.jit
    def gradient(variables, tokens, lengths, weights):
        return jax.grad(lambda v: jnp.sum(weights * sentence_vectors(module, v, tokens, lengths)))(variables)

    assert not np.any(np.asarray(vectors_of(module, variables, tokens, LENGTHS))[3])
    with_filler = gradient(variables, tokens, LENGTHS, weights)
    louder = weights.copy()
    louder[3] *= 1e6
    for one, other in zip(
        jax.tree.leaves(with_filler), jax.tree.leaves(gradient(variables, tokens, LENGTHS, louder)), strict=True
    ):
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, other)  # whatever a filler's weight, nothing comes back from it
    nothing = gradient(variables, tokens, np.zeros(4, np.int32), weights)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize(("pooling", "of"), [("cls", lambda states: states[0]), ("max", lambda states: states.max(0))])
def test_other_poolings(bert, pooling, of):
    """The first token's state, and the largest of each number over the real tokens; fillers give nothing back."""
    _, variables = bert
    module, _ = tiny_bert(pooling=pooling)
    tokens = random_tokens(8)
    vectors = np.asarray(vectors_of(module, variables, tokens, LENGTHS))
    for row, length in enumerate(LENGTHS):
        expected = of(reference_states(module.config, variables["params"], tokens[row, :length])) if length else 0.0
        expected = expected / np.linalg.norm(expected) if length else np.zeros(BERT["hidden_size"])
        np.testing.assert_allclose(vectors[row], expected, atol=1e-5)
    junk = np.where(np.arange(8) < LENGTHS[:, None], tokens, 7)
    np.testing.assert_array_equal(vectors_of(module, variables, junk, LENGTHS), vectors)
    lengths = np.zeros_like(LENGTHS)
    nothing = jax.grad(lambda v: jnp.sum(sentence_vectors(module, v, tokens, lengths)))(variables)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(nothing))


def test_gelu_is_the_exact_one(bert):
    """The tanh approximation is off by up to 5e-4: too much for 1e-5 against the reference implementation."""
    module, variables = bert
    inner = variables["params"]["encoder"]["layer"]["intermediate"]["dense"]
    loud = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 5 if path[-3].key == "intermediate" and path[-2].key == "dense" else leaf,
        variables["params"],
    )
    assert np.abs(loud["encoder"]["layer"]["intermediate"]["dense"]["kernel"]).max() > np.abs(inner["kernel"]).max()
    tokens = random_tokens(8)
    vectors = np.asarray(vectors_of(module, {"params": loud}, tokens, LENGTHS))
    mean = reference_states(module.config, loud, tokens[0, :6]).mean(axis=0)
    np.testing.assert_allclose(vectors[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_bfloat16_gives_float32_unit_vectors(bert):
    _, variables = bert
    module, _ = tiny_bert(dtype="bfloat16")
    vectors = np.asarray(vectors_of(module, variables, random_tokens(8), LENGTHS))
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors[:3], axis=1), 1.0, rtol=1e-5)
    exact = np.asarray(vectors_of(bert[0], variables, random_tokens(8), LENGTHS))
    assert (np.sum(vectors[:3] * exact[:3], axis=1) > 0.99).all()


HF = BERT | {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "pad_token_id": 0}


def test_config_is_read():
    assert BertConfig.from_hf(HF) == BertConfig(**BERT)
    assert BertConfig.from_hf(HF, dtype="bfloat16").dtype == "bfloat16"


def test_what_config_leaves_out_is_bert_bases():
    config = BertConfig.from_hf({"model_type": "bert", "hidden_size": 96, "layer_norm_eps": None})
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (96, 3072, 12)
    assert (config.vocab_size, config.type_vocab_size, config.max_position_embeddings) == (30522, 2, 512)
    assert (config.num_attention_heads, config.layer_norm_eps) == (12, 1e-12)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new'"),
        ({"model_type": "roberta"}, "model_type = 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"is_decoder": True}, "is_decoder = True"),
        ({"is_decoder": 0}, "is_decoder = 0, but only False is supported"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"layer_norm_eps": 0}, "layer_norm_eps = 0 where a number above 0 is needed"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps = nan"),
        ({"type_vocab_size": 0}, "type_vocab_size = 0 where a whole number from 1 on is needed"),
        ({"hidden_size": "16"}, "hidden_size = '16'"),
        ({"num_attention_heads": True}, "num_attention_heads = True"),
    ],
)
def test_what_would_change_the_result_is_an_error_that_names_it(changes, named):
    with pytest.raises(UserError, match="config.json") as error:
        BertConfig.from_hf(HF | changes)
    assert named in str(error.value)
