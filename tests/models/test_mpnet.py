"""MPNet against a float64 reference with loops, its buckets against cases worked by hand, and packed rows."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.errors import UserError
from ragjax.models.encoders import sentence_vectors
from ragjax.models.mpnet import MPNetConfig, relative_position_buckets
from tests.tiny_modules import MPNET, tiny_mpnet

LENGTHS = (200, 7, 1)  # the first reaches the last bucket, whose distances start at 91


def reference_bucket(distance: int) -> int:
    """Raffel et al. 2020, section 2.1, as released: 8 buckets of one distance, 8 whose starts grow by sqrt(2)."""
    size = abs(distance)
    bucket = size if size < 8 else min(8 + math.floor(2 * math.log2(size / 8)), 15)
    return bucket + 16 if distance > 0 else bucket


def reference_states(config: MPNetConfig, params, tokens) -> np.ndarray:
    """States [S, D] of one unpadded text in float64: one head, one query and one key at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, weights):
        rows = []
        for row in x:
            variance = sum((value - row.mean()) ** 2 for value in row) / len(row)
            rows.append((row - row.mean()) / math.sqrt(variance + config.layer_norm_eps))
        return np.array(rows) * weights["scale"] + weights["bias"]

    def dense(x, weights):
        return x @ weights["kernel"] + weights["bias"]

    def gelu(x):
        return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))

    tables, encoder = params["embeddings"], params["encoder"]
    words, places = (tables[name]["embedding"] for name in ("word_embeddings", "position_embeddings"))
    x = norm(np.array([words[token] + places[2 + i] for i, token in enumerate(tokens)]), tables["LayerNorm"])
    width = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        weights = jax.tree.map(lambda leaf, layer=layer: leaf[layer], encoder["layer"])
        attention = weights["attention"]
        queries, keys, values = (dense(x, attention["attn"][name]) for name in "qkv")
        mixed = np.zeros_like(x)
        for head in range(config.num_attention_heads):
            part = slice(head * width, (head + 1) * width)
            for i in range(len(tokens)):
                shares = []
                for j in range(len(tokens)):
                    bias = encoder["relative_attention_bias"]["embedding"][reference_bucket(j - i), head]
                    shares.append(math.exp(queries[i, part] @ keys[j, part] / math.sqrt(width) + bias))
                mixed[i, part] = np.array(shares) / sum(shares) @ values[:, part]
        x = norm(x + dense(mixed, attention["attn"]["o"]), attention["LayerNorm"])
        inner = np.vectorize(gelu)(dense(x, weights["intermediate"]["dense"]))
        x = norm(x + dense(inner, weights["output"]["dense"]), weights["output"]["LayerNorm"])
    return x


@pytest.fixture(scope="module")
def mpnet():
    """With biases large enough that a wrong bucket would be seen from afar."""
    module, variables = tiny_mpnet()
    variables["params"]["encoder"]["relative_attention_bias"]["embedding"] *= 5
    return module, variables


@functools.partial(jax.jit, static_argnums=0)
def states_of(module, variables, tokens, segments, positions):
    return module.apply(variables, tokens, segments, positions)


@functools.partial(jax.jit, static_argnums=0)
def vectors_of(module, variables, tokens, lengths):
    return sentence_vectors(module, variables, tokens, lengths)


def random_texts(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, MPNET["vocab_size"], length).astype(np.int32) for length in LENGTHS]


@pytest.mark.parametrize(
    ("distance", "bucket"),
    [
        # A bucket for each, then one from each 8 * sqrt(2)**k on: 11.3, 16, 22.6, 32, 45.3, 64, 90.5.
        (0, 0), (-1, 1), (-2, 2), (-7, 7), (-8, 8), (-11, 8), (-12, 9), (-15, 9), (-16, 10), (-22, 10), (-23, 11),
        (-31, 11), (-32, 12), (-45, 12), (-46, 13), (-63, 13), (-64, 14), (-90, 14), (-91, 15), (-127, 15),
        (-128, 15), (-129, 15), (-511, 15),
        # The same for keys behind the query.
        (1, 17), (7, 23), (8, 24), (11, 24), (12, 25), (90, 30), (91, 31), (128, 31), (511, 31),
    ],
)  # fmt: skip
def test_buckets_by_hand(distance, bucket):
    assert reference_bucket(distance) == bucket
    assert relative_position_buckets(jnp.array([[distance]])).tolist() == [[bucket]]


def test_every_bucket_equals_the_reference():
    distances = np.arange(-600, 601)
    expected = [reference_bucket(distance) for distance in distances]
    assert relative_position_buckets(jnp.asarray(distances)).tolist() == expected


def test_states_and_vectors_equal_the_reference(mpnet):
    """Padded texts, with junk behind them that nothing may see."""
    module, variables = mpnet
    texts = random_texts()
    tokens = np.random.default_rng(1).integers(0, MPNET["vocab_size"], (3, 208)).astype(np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    positions = np.broadcast_to(np.arange(208, dtype=np.int32), tokens.shape)
    lengths = np.array(LENGTHS, np.int32)
    states = states_of(module, variables, tokens, (positions < lengths[:, None]).astype(np.int32), positions)
    vectors = vectors_of(module, variables, tokens, lengths)
    for row, text in enumerate(texts):
        expected = reference_states(module.config, variables["params"], text)
        np.testing.assert_allclose(states[row, : len(text)], expected, atol=1e-5)
        mean = expected.mean(axis=0)
        np.testing.assert_allclose(vectors[row], mean / np.linalg.norm(mean), atol=2e-6)


def test_packed_texts_do_not_see_each_other(mpnet):
    """Three texts in one row, padding between and behind them, equal each alone."""
    module, variables = mpnet
    texts = random_texts(seed=2)
    tokens, segments, positions = np.zeros((3, 1, 224), np.int32)
    places, column = [], 3
    for number, text in enumerate(texts, start=1):
        place = slice(column, column + len(text))
        tokens[0, place], segments[0, place], positions[0, place] = text, number, np.arange(len(text))
        places.append(place)
        column += len(text) + 2
    packed = states_of(module, variables, tokens, segments, positions)
    for text, place in zip(texts, places, strict=True):
        alone = np.zeros((3, 1, 224), np.int32)
        alone[:, 0, : len(text)] = text, np.ones(len(text)), np.arange(len(text))
        np.testing.assert_allclose(packed[0, place], states_of(module, variables, *alone)[0, : len(text)], atol=2e-6)


def test_the_biases_learn_where_texts_reach(mpnet):
    """A text of 7 tokens has distances -6 to 6; the gradient of its vector is that of differences."""
    module, variables = mpnet
    tokens = np.zeros((1, 8), np.int32)
    tokens[0, :7] = random_texts()[1]
    lengths, weights = np.array([7], np.int32), np.random.default_rng(3).normal(size=(1, 16)).astype(np.float32)

    @jax.jit
    def loss(biases):
        encoder = variables["params"]["encoder"] | {"relative_attention_bias": {"embedding": biases}}
        params = variables["params"] | {"encoder": encoder}
        return jnp.sum(weights * sentence_vectors(module, {"params": params}, tokens, lengths))

    biases = variables["params"]["encoder"]["relative_attention_bias"]["embedding"]
    gradient = np.asarray(jax.jit(jax.grad(loss))(biases))
    assert set(np.flatnonzero(np.abs(gradient).max(axis=1))) == {*range(7), *range(17, 23)}
    step = 0.03 * gradient / np.linalg.norm(gradient)
    slope = (loss(biases + step) - loss(biases - step)) / 0.06
    np.testing.assert_allclose(slope, np.linalg.norm(gradient), rtol=2e-3)


def test_bfloat16_gives_float32_unit_vectors(mpnet):
    module, variables = mpnet
    coarse, _ = tiny_mpnet(dtype="bfloat16")
    tokens, lengths = random_texts()[0][None], np.array([200], np.int32)
    vectors = np.asarray(vectors_of(coarse, variables, tokens, lengths))
    assert vectors.dtype == np.float32
    assert np.sum(vectors * vectors_of(module, variables, tokens, lengths)) > 0.99


HF = MPNET | {"model_type": "mpnet", "hidden_act": "gelu", "relative_attention_num_buckets": 32, "pad_token_id": 1}


def test_config_is_read():
    config = MPNetConfig.from_hf(HF, dtype="bfloat16")
    assert config == MPNetConfig(**MPNET, dtype="bfloat16")
    assert config.longest_input == 300  # two rows of the position table belong to no token
    left_out = {name: value for name, value in HF.items() if name != "relative_attention_num_buckets"}
    assert MPNetConfig.from_hf(left_out) == MPNetConfig(**MPNET)
    plain = MPNetConfig.from_hf({"model_type": "mpnet"})
    assert (plain.vocab_size, plain.hidden_size, plain.layer_norm_eps) == (30527, 768, 1e-12)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"model_type": "bert"}, "model_type = 'bert'"),
        ({"relative_attention_num_buckets": 64}, "relative_attention_num_buckets = 64"),
        ({"num_attention_heads": 3}, "num_attention_heads = 3"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps = -1e-05 where a number above 0 is needed"),
        ({"max_position_embeddings": "514"}, "max_position_embeddings = '514'"),
    ],
)
def test_what_would_change_the_result_is_an_error_that_names_it(changes, named):
    with pytest.raises(UserError, match="config.json") as error:
        MPNetConfig.from_hf(HF | changes)
    assert named in str(error.value)
