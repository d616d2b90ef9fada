"""The decoder against a float64 reference written with loops and complex rotations, and against itself: cached,
packed, padded, scanned, unrolled, rematerialised, with adapters and with these merged into the weights."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.config import QUANTIZE, REMAT
from ragjax.costs import ModelSize, forward_flops, train_flops
from ragjax.errors import UserError
from ragjax.models.decoder import Decoder, empty_slots, for_decoding, unstack
from ragjax.models.decoder_config import DecoderConfig
from ragjax.models.layers import Projection
from ragjax.models.lora import LoraConfig
from ragjax.models.quantize import dequantize, quantize
from ragjax.models.rope import DynamicRope, LinearRope, Llama3Rope, RopeScaling, YarnRope
from ragjax.pretrained import abstract_decoder
from tests.tiny_modules import DECODER, random_variables, tiny_decoder

LORA = LoraConfig(rank=3, alpha=6.0)
QWEN = {"qk_norm": True, "qkv_bias": True}  # everything that a layer can have


def reference_hidden(config: DecoderConfig, params, tokens) -> np.ndarray:
    """States [S, D] of one unpadded text in float64: one token and one head at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    frequencies = reference_frequencies(config, len(tokens))
    sharpened = 1.3 if isinstance(config.rope_scaling, YarnRope) else 1.0
    window = config.sliding_window or len(tokens)

    def project(part, name, x):
        return x @ part[name]["kernel"] + part[name].get("bias", 0.0)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2) + config.rms_norm_eps) * scale

    def turn(vector, position):
        turned = (vector[: width // 2] + 1j * vector[width // 2 :]) * np.exp(1j * position * frequencies)
        return np.concatenate([turned.real, turned.imag]) * sharpened

    def heads_of(part, name, x, count):
        vectors = project(part, f"{name}_proj", x).reshape(count, width)
        return np.stack([norm(v, part[f"{name}_norm"]["scale"]) for v in vectors]) if config.qk_norm else vectors

    states = [params["embed_tokens"]["embedding"][token] for token in tokens]
    for layer in range(config.num_hidden_layers):
        weights = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        attention, mlp = weights["self_attn"], weights["mlp"]
        normed = [norm(x, weights["input_layernorm"]["scale"]) for x in states]
        keys = [heads_of(attention, "k", x, groups) for x in normed]
        values = [project(attention, "v_proj", x).reshape(groups, width) for x in normed]
        for s, x in enumerate(normed):
            queries, mixed = heads_of(attention, "q", x, heads), []
            for head in range(heads):
                group = head // (heads // groups)
                query = turn(queries[head], s)
                seen = range(max(s - window + 1, 0), s + 1)
                scores = [query @ turn(keys[c][group], c) / math.sqrt(width) for c in seen]
                shares = np.exp(np.array(scores) - max(scores))
                shares /= shares.sum()
                mixed.append(sum(share * values[c][group] for c, share in zip(seen, shares, strict=True)))
            states[s] = states[s] + project(attention, "o_proj", np.concatenate(mixed))
        for s, x in enumerate(states):
            normed_x = norm(x, weights["post_attention_layernorm"]["scale"])
            gate = project(mlp, "gate_proj", normed_x)
            up = project(mlp, "up_proj", normed_x)
            states[s] = x + project(mlp, "down_proj", gate / (1 + np.exp(-gate)) * up)
    return np.stack([norm(x, params["norm"]["scale"]) for x in states])


def reference_frequencies(config: DecoderConfig, length: int) -> np.ndarray:
    """Pair by pair, for a text of `length` tokens."""
    scaling, theta, width = config.rope_scaling, config.rope_theta, config.head_dim
    if isinstance(scaling, DynamicRope):
        stretch = max(length, scaling.max_position_embeddings) / scaling.max_position_embeddings
        theta *= (scaling.factor * stretch - scaling.factor + 1) ** (width / (width - 2))
    frequencies = [theta ** (-i / width) for i in range(0, width, 2)]
    if isinstance(scaling, LinearRope):
        frequencies = [frequency / scaling.factor for frequency in frequencies]
    if isinstance(scaling, YarnRope):
        frequencies = [yarn_frequency(scaling, theta, width, pair) for pair in range(width // 2)]
    if isinstance(scaling, Llama3Rope):
        frequencies = [llama3_frequency(scaling, frequency) for frequency in frequencies]
    return np.array(frequencies)


def yarn_frequency(scaling: YarnRope, theta: float, width: int, pair: int) -> float:
    """The paper's gamma, by the number of the pair between the last kept and the first divided one."""
    frequency = theta ** (-2 * pair / width)
    first = math.floor(width / 2 * math.log(scaling.original_max_position_embeddings / 2 / math.pi / 2.0, theta))
    last = math.ceil(width / 2 * math.log(scaling.original_max_position_embeddings / 2 / math.pi / 0.25, theta))
    assert (first, last) == (1, 4)  # or the case would not have all three kinds of pairs
    if pair <= first:
        return frequency
    if pair >= last:
        return frequency / scaling.factor
    share = (pair - first) / (last - first)
    return frequency * (1 - share) + frequency / scaling.factor * share


def llama3_frequency(scaling: Llama3Rope, frequency: float) -> float:
    """Case by case, on the wave's length in tokens."""
    length, context = 2 * math.pi / frequency, scaling.original_max_position_embeddings
    if length > context / scaling.low_freq_factor:
        return frequency / scaling.factor
    if length < context / scaling.high_freq_factor:
        return frequency
    smooth = (context / length - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(module, variables, tokens, segment_ids, positions):
    return module.apply(variables, tokens, segment_ids, positions)


def texts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, DECODER["vocab_size"], length) for length in lengths]


def padded_rows(sequences, width):
    tokens, positions = np.full((len(sequences), width), 7), np.broadcast_to(np.arange(width), (len(sequences), width))
    segments = np.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)], segments[row, : len(sequence)] = sequence, 1
    return tokens, segments, positions


def close(got, expected, tolerance=1e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=tolerance * np.abs(expected).max())


# --- what the model computes


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"rope_theta": 100.0},
        {"attention_bias": True, "head_dim": 6},
        {"mlp_bias": True},
        {"sliding_window": 1},
        {"sliding_window": 3},
        {"sliding_window": 9},
        # Of head_dim 12 and theta 100, waves of 6.3 to 292 tokens: one stays, three are mixed, two are slowed.
        {"rope_scaling": Llama3Rope(8.0, 0.3, 2.0, 14), "rope_theta": 100.0, "head_dim": 12},
        {"rope_scaling": LinearRope(4.0)},
        {
            "rope_scaling": DynamicRope(4.0, 6),
            "head_dim": 6,
            "num_attention_heads": 2,
        },  # one row is longer, two are not
        {"rope_scaling": YarnRope(8.0, 30, 1.3, 2.0, 0.25), "rope_theta": 100.0, "head_dim": 12},
        {"qkv_bias": True},
        {"qk_norm": True, "head_dim": 6},
    ],
    ids=str,
)
def test_states_equal_the_reference(variant):
    """Rows of different lengths, padded on the right with a real token's id."""
    module, variables = tiny_decoder(**variant)
    sequences = texts(9, 4, 1)
    hidden = hidden_states(module, variables, *padded_rows(sequences, 12))
    assert np.isfinite(hidden).all()
    for row, sequence in enumerate(sequences):
        close(hidden[row, : len(sequence)], reference_hidden(module.config, variables["params"], sequence))


def test_packed_prompts_do_not_see_each_other():
    """Three texts in one row, the last segment out of order in number, positions from 0 in each."""
    module, variables = tiny_decoder()
    one, two, three = texts(5, 4, 3)
    tokens = np.concatenate([one, two, three, [7, 7]])[None]
    segments = np.repeat([1, 3, 2, 0], [5, 4, 3, 2])[None]
    positions = np.concatenate([np.arange(5), np.arange(4), np.arange(3), [0, 0]])[None]
    hidden = np.asarray(hidden_states(module, variables, tokens, segments, positions)[0])
    for start, text in ((0, one), (5, two), (9, three)):
        close(hidden[start : start + len(text)], reference_hidden(module.config, variables["params"], text))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_a_product_with_the_head(tied):
    module, variables = tiny_decoder(tie_word_embeddings=tied)
    params = variables["params"]
    head = params["embed_tokens"]["embedding"].T if tied else params["lm_head"]["kernel"]
    assert ("lm_head" in params) != tied
    states = np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)
    logits = module.apply(variables, states, method="logits")
    assert logits.dtype == jnp.float32
    close(logits, states.astype(np.float64) @ head)


def test_full_logits_join_the_two():
    module, variables = tiny_decoder()
    rows = padded_rows(texts(6, 3), 8)
    logits = jax.jit(functools.partial(module.apply, method="full_logits"))(variables, *rows)
    expected = np.asarray(hidden_states(module, variables, *rows)) @ variables["params"]["lm_head"]["kernel"]
    close(logits, expected)


@pytest.mark.parametrize("is_laid_out", [False, True], ids=["stacked", "for_decoding"])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"sliding_window": 1},
        {"sliding_window": 3},
        {"sliding_window": 6},
        {"qk_norm": True, "qkv_bias": True, "head_dim": 6},
        {"rope_scaling": YarnRope(8.0, 30, 1.3, 2.0, 0.25), "rope_theta": 100.0, "head_dim": 12},
        {"rope_scaling": DynamicRope(4.0, 9)},  # as long as prompt and branch
    ],
    ids=str,
)
def test_branches_that_go_on_from_prompts_equal_uncached(variant, is_laid_out):
    """Prompts of two lengths, each with two branches of three tokens, fed one token a time and then two at once; the
    second branch takes its first token over from the first one."""
    module, variables = tiny_decoder(**variant)
    prompts, new = texts(6, 4), np.array([texts(3, 3, seed=1), texts(3, 3, seed=2)])  # new: [row, branch, step]
    new[:, 1, 0] = new[:, 0, 0]
    uncached = [
        [reference_hidden(module.config, variables["params"], [*prompt, *branch]) for branch in branches]
        for prompt, branches in zip(prompts, new, strict=True)
    ]
    tokens, segments, _ = padded_rows(prompts, 8)
    hidden, kept = jax.jit(functools.partial(module.apply, method="prefill"))(variables, tokens, segments.sum(axis=1))
    for row, prompt in enumerate(prompts):
        close(hidden[row, : len(prompt)], uncached[row][0][: len(prompt)])
    if is_laid_out:
        module, variables = for_decoding(module, variables)
        kept = kept._replace(slots=unstack(kept.slots))
    extend = jax.jit(functools.partial(module.apply, method="extend"))
    # Slot by slot: the first token of both, then steps 1 and 2 of each branch.
    slot_steps, slots = np.array([0, 1, 1, 2, 2]), empty_slots(module.config, 2, 5)
    seen = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]], bool)
    fed = np.stack([new[:, 0, 0], new[:, 0, 1], new[:, 1, 1], new[:, 0, 2], new[:, 1, 2]], axis=1)
    owners = [(0, 1), (0,), (1,), (0,), (1,)]
    for start, stop in ((0, 1), (1, 2), (2, 3), (3, 5)):
        visible = np.broadcast_to(seen[start:stop], (2, stop - start, 5))
        call = (fed[:, start:stop], slot_steps[start:stop], visible, kept, slots, slot_steps, start)
        hidden, slots = extend(variables, *call)
        for slot in range(start, stop):
            for row, prompt in enumerate(prompts):
                for branch in owners[slot]:
                    expected = uncached[row][branch][len(prompt) + slot_steps[slot]]
                    close(hidden[row, slot - start], expected)


# --- how it is computed


def test_scanned_unrolled_and_rematerialised_agree():
    rows = padded_rows(texts(9, 6), 12)
    weights = np.random.default_rng(1).normal(size=(2, 12, 16)) * (rows[1] > 0)[..., None]
    results = {}
    for scan, remat in ((s, r) for r in REMAT for s in (True, False)):
        module, variables = tiny_decoder(scan_layers=scan, remat=remat, lora=LORA, **QWEN)
        loss = jax.jit(jax.value_and_grad(lambda v, m=module: jnp.sum(weights * m.apply(v, *rows))))
        results[scan, remat] = loss(variables)
    value, gradient = results.pop((True, "none"))
    assert all(np.linalg.norm(leaf) > 0 for path, leaf in jax.tree_util.tree_leaves_with_path(gradient["lora"]))
    for other_value, other_gradient in results.values():
        np.testing.assert_allclose(other_value, value, rtol=1e-5)
        assert jax.tree.structure(other_gradient) == jax.tree.structure(gradient)
        jax.tree.map(close, other_gradient, gradient)


@pytest.mark.parametrize(("kind", "remat"), list(zip(QUANTIZE, ("none", "partial"), strict=True)))
def test_a_quantised_base_equals_the_dequantised_one(kind, remat):
    """States and the adapters' gradients; the base itself is moved by rounding, so that the test compares something."""
    module, variables = tiny_decoder(lora=LORA, remat=remat, **QWEN)
    quantised = Decoder(dataclasses.replace(module.config, quantize=kind))

    def is_kernel(path):
        return path[0].key == "layers" and path[-1].key == "kernel"

    @jax.jit
    def store(params):
        each_layer = jax.vmap(functools.partial(quantize, kind=kind))
        return jax.tree.map_with_path(lambda path, leaf: each_layer(leaf) if is_kernel(path) else leaf, params)

    @jax.jit
    def restore(params, stored):
        def dense(path, leaf, kept):
            return jax.vmap(lambda q: dequantize(q, leaf.shape[1]))(kept) if is_kernel(path) else leaf

        return jax.tree.map_with_path(dense, params, stored)

    stored = store(variables["params"])
    dense = restore(variables["params"], stored)
    rows = padded_rows(texts(9, 6), 12)
    weights = np.random.default_rng(1).normal(size=(2, 12, 16)) * (rows[1] > 0)[..., None]

    def outcome(module, params):
        def loss(lora, params):
            hidden = module.apply({"params": params, "lora": lora}, *rows)
            return jnp.sum(weights * hidden), hidden

        (_, hidden), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["lora"], params)
        return np.asarray(hidden)[rows[1] > 0], gradient

    hidden, gradient = outcome(quantised, stored)
    expected, expected_gradient = outcome(module, dense)
    close(hidden, expected)
    jax.tree.map(close, gradient, expected_gradient)
    assert np.abs(hidden - outcome(module, variables["params"])[0]).max() > 1e-3


def test_bfloat16_activations_stay_near_float32():
    """Half precision runs, and its hidden states are rounded, not wrong: 8 bits of mantissa, two layers."""
    rows = padded_rows(texts(9), 12)
    module, variables = tiny_decoder()
    half = Decoder(dataclasses.replace(module.config, dtype="bfloat16"))
    hidden = hidden_states(half, variables, *rows)
    assert hidden.dtype == jnp.bfloat16
    close(np.asarray(hidden, np.float32)[:, :9], hidden_states(module, variables, *rows)[:, :9], tolerance=0.05)


# --- adapters


def test_a_fresh_adapter_is_the_base_model():
    rows = padded_rows(texts(9), 12)
    base, variables = tiny_decoder(7)
    module = Decoder(dataclasses.replace(base.config, lora=LORA))
    fresh = jax.jit(lambda key: module.init(key, *rows)["lora"])(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(fresh):
        width = leaf.shape[-2]  # A is [L, in, r]: uniform within 1 / sqrt(in)
        assert (np.abs(leaf) <= width**-0.5).all() if path[-1].key == "lora_a" else not np.any(leaf)
        assert path[-1].key == "lora_b" or np.abs(leaf).max() > 0.5 * width**-0.5
    queries = np.asarray(fresh["layers"]["self_attn"]["q_proj"]["lora_a"])
    assert not np.allclose(queries[0], queries[1])  # each layer draws its own
    hidden = hidden_states(module, {**variables, "lora": fresh}, *rows)
    np.testing.assert_array_equal(hidden, hidden_states(base, variables, *rows))


@pytest.mark.parametrize("targets", [LORA.targets, ("q_proj", "down_proj")])
def test_merged_weights_equal_the_adapter(targets):
    """W + (alpha / r) A B in each targeted projection."""
    config = dataclasses.replace(LORA, alpha=7.5, targets=targets)
    module, variables = tiny_decoder(lora=config, **QWEN)
    rows = padded_rows(texts(9, 5), 12)
    adapted = {path[-2].key for path, _ in jax.tree_util.tree_leaves_with_path(variables["lora"])}
    assert adapted == set(targets)
    merged = jax.tree.map(np.array, variables["params"])
    for block, projections in variables["lora"]["layers"].items():
        for name, adapter in projections.items():
            product = np.einsum("lir,lro->lio", adapter["lora_a"], adapter["lora_b"])
            merged["layers"][block][name]["kernel"] += 7.5 / 3 * product
    plain = Decoder(dataclasses.replace(module.config, lora=None))
    with_adapter = hidden_states(module, variables, *rows)
    close(with_adapter, hidden_states(plain, {"params": merged}, *rows))
    base = hidden_states(plain, {"params": variables["params"]}, *rows)
    assert np.abs(np.asarray(with_adapter) - np.asarray(base)).max() > 0.01


WIDE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "scan_layers": False,
}
RANK = 8


def counted_flops(function, *arguments) -> float:
    """What XLA counts in the program as it is handed over, before fusion; nothing runs."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def test_flops_by_formula_equal_cost_analysis():
    """A small unrolled model without rematerialisation, wide enough for matrix products to dominate.

    The formulas leave out norms, rotations, softmax and other element-wise work (1-3 % here). LoRA's count is also
    up to 2 % too high: the backward pass ends at the first layer's adapters, before that layer's frozen q, k and v.
    """
    rows, length = 4, 32
    module = Decoder(DecoderConfig(**DECODER | WIDE, lora=LoraConfig(rank=RANK)))
    plain = Decoder(dataclasses.replace(module.config, lora=None))
    inputs = [jax.ShapeDtypeStruct((rows, length), np.int32)] * 3
    shapes = jax.eval_shape(functools.partial(module.init, method="full_logits"), jax.random.key(0), *inputs)
    params, lora = shapes["params"], shapes["lora"]
    wide, inner, keys = 256, 1024, 128
    weights = 4 * (2 * wide * wide + 2 * wide * keys + 3 * wide * inner)
    adapters = 4 * RANK * ((wide + wide) * 2 + (wide + keys) * 2 + (wide + inner) * 3)
    assert adapters == sum(leaf.size for leaf in jax.tree.leaves(lora))
    size = ModelSize(weights, wide * 512, 0, layers=4, attention_width=wide)
    with_lora = dataclasses.replace(size, lora_weights=adapters)
    lengths, head = [length] * rows, rows * length

    def plain_sum(params, *inputs):
        return jnp.sum(plain.apply({"params": params}, *inputs, method="full_logits") ** 2)

    def lora_sum(lora, params, *inputs):
        return jnp.sum(module.apply({"params": params, "lora": lora}, *inputs, method="full_logits") ** 2)

    forward = counted_flops(plain_sum, params, *inputs)
    full = counted_flops(jax.grad(plain_sum), params, *inputs)
    adapted = counted_flops(jax.grad(lora_sum), lora, params, *inputs)
    assert forward == pytest.approx(forward_flops(size, lengths, head), rel=0.03)
    assert full == pytest.approx(train_flops(size, lengths, head), rel=0.03)
    assert adapted == pytest.approx(train_flops(with_lora, lengths, head), rel=0.03)
    # 4N against 6N: no gradient of a base weight is formed in order to be thrown away.
    assert adapted < 0.75 * full
    assert jax.tree.structure(jax.eval_shape(jax.grad(lora_sum), lora, params, *inputs)) == jax.tree.structure(lora)


# --- adapter dropout


def dropped(x, ids, rate, key=0):
    """What is left of x [R, S, 64]: kernel 0 and A = B = 1, so that the adapter's output is its dropped-out input."""
    module = Projection(64, lora=LoraConfig(rank=64, alpha=64.0, dropout=rate))
    variables = {"params": {"kernel": jnp.zeros((64, 64))}, "lora": {"lora_a": jnp.eye(64), "lora_b": jnp.eye(64)}}
    return np.asarray(module.apply(variables, x, ids, rngs={"dropout": jax.random.key(key)}))


def test_dropout_keeps_its_share_and_scales():
    x = np.ones((8, 40, 64), np.float32)
    ids = np.arange(320, dtype=np.int32).reshape(8, 40)
    out = dropped(x, ids, 0.25)
    kept = out != 0
    np.testing.assert_allclose(out[kept], 1 / 0.75, rtol=1e-5)
    # 20,480 draws: a standard deviation of 0.003.
    assert abs(kept.mean() - 0.75) < 0.012
    assert abs(kept.mean(axis=(0, 1)) - 0.75).max() < 0.12 and abs(kept.mean(axis=2) - 0.75).max() < 0.3
    assert (dropped(x, ids, 0.0) == 1).all() and (dropped(x, None, 0.25) == 1).all()
    assert (dropped(x, ids, 0.25, key=1) != out).any()


def test_dropout_depends_on_the_tokens_id_alone():
    x = np.ones((2, 6, 64), np.float32)
    ids = np.array([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]], np.int32)
    out = dropped(x, ids, 0.5)
    patterns = {int(i): tuple(row != 0) for i, row in zip(ids.ravel(), out.reshape(-1, 64), strict=True)}
    assert len(set(patterns.values())) == 12
    moved = np.random.default_rng(0).permutation(ids.ravel()).astype(np.int32)
    for shape in ((2, 6), (3, 4), (12, 1)):
        again = dropped(np.ones((*shape, 64), np.float32), moved.reshape(shape), 0.5)
        for i, row in zip(moved, again.reshape(-1, 64), strict=True):
            assert tuple(row != 0) == patterns[int(i)]


def test_dropout_in_the_decoder_follows_the_prompt():
    module, variables = tiny_decoder(lora=dataclasses.replace(LORA, dropout=0.3))
    (text,) = texts(6)

    @jax.jit
    def run(tokens, segments, positions, ids):
        return module.apply(
            variables, tokens, segments, positions, dropout_ids=ids, rngs={"dropout": jax.random.key(1)}
        )

    ids = np.arange(6) + 40
    other = np.arange(6) + 90
    tokens = np.stack([np.concatenate([text, text]), np.concatenate([text, text])])
    segments = np.stack([np.repeat([1, 2], 6)] * 2)
    positions = np.stack([np.tile(np.arange(6), 2)] * 2)
    out = np.asarray(
        run(tokens, segments, positions, np.stack([np.concatenate([ids, other]), np.concatenate([other, ids])]))
    )
    close(out[0, :6], out[1, 6:])
    close(out[0, 6:], out[1, :6])
    assert np.abs(out[0, :6] - out[0, 6:]).max() > 1e-3


# --- config.json


OLD = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}


def changed(config, **changes):
    return {name: value for name, value in (config | changes).items() if value != "absent"}


def test_both_spellings_of_config_are_read():
    new = changed(OLD, rope_theta="absent", rope_scaling="absent", torch_dtype="absent", dtype="bfloat16") | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}
    }
    assert DecoderConfig.from_hf(OLD) == DecoderConfig.from_hf(new)
    config = DecoderConfig.from_hf(new, remat="full")
    assert (config.rope_theta, config.head_dim, config.tie_word_embeddings, config.remat) == (5e5, 4, True, "full")


LINEAR = {"type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_what_a_config_leaves_out_is_what_transformers_takes():
    """Of a config.json with nothing but its type: the numbers of transformers' own configuration classes."""
    named = ("vocab_size", "intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings")
    for model_type, numbers in {
        "llama": (32000, 11008, 32, 128, 2048),
        "mistral": (32000, 14336, 8, 128, 131072),
        "qwen2": (151936, 22016, 32, 128, 32768),
        "qwen3": (151936, 22016, 32, 128, 32768),
    }.items():
        for config in ({"model_type": model_type}, {"model_type": model_type, "rms_norm_eps": None, "head_dim": None}):
            read = DecoderConfig.from_hf(config)
            assert tuple(getattr(read, name) for name in named) == numbers
            assert (read.hidden_size, read.num_hidden_layers, read.num_attention_heads) == (4096, 32, 32)
            assert (read.rms_norm_eps, read.rope_theta, read.tie_word_embeddings) == (1e-6, 10000.0, False)
            assert read.rope_scaling == RopeScaling()


def test_heads_that_a_config_leaves_out_follow_from_the_others():
    small = changed(OLD, num_key_value_heads="absent")
    assert DecoderConfig.from_hf(small).num_key_value_heads == 4
    assert DecoderConfig.from_hf(small | {"model_type": "qwen2", "num_key_value_heads": None}).num_key_value_heads == 4
    assert DecoderConfig.from_hf(small | {"model_type": "qwen2", "num_key_value_heads": 2}).head_dim == 4
    assert DecoderConfig.from_hf(small | {"model_type": "qwen3", "num_key_value_heads": 2}).head_dim == 128


def test_biases_and_norms_are_those_of_the_model_type():
    """What transformers does not read for a type is not read here: Mistral and Qwen2 take no attention_bias."""
    found = {}
    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        read = DecoderConfig.from_hf(OLD | {"model_type": model_type, "attention_bias": True, "mlp_bias": True})
        found[model_type] = (read.attention_bias, read.qkv_bias, read.qk_norm, read.mlp_bias)
    assert found == {
        "llama": (True, False, False, True),
        "mistral": (False, False, False, False),
        "qwen2": (False, True, False, False),
        "qwen3": (True, False, True, False),
    }


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({}, None),
        ({"sliding_window": 8}, None),
        ({"sliding_window": 8, "use_sliding_window": False}, None),
        ({"sliding_window": 8, "use_sliding_window": True}, None),  # from the 29th layer on
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, None),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8),
        ({"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
        ({"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 8),
        ({"sliding_window": 8, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_a_qwen_has_a_window_where_all_its_layers_do(model_type, changes, window):
    assert DecoderConfig.from_hf(OLD | {"model_type": model_type} | changes).sliding_window == window


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_every_scaling_is_read_in_both_spellings(field, key):
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64, "finetuned": True}
    deepseek = yarn | {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16, "beta_slow": 2, "truncate": False}
    whole, half = 0.1 * math.log(4) + 1, 0.05 * math.log(4) + 1
    for given, expected in (
        ({key: "default"}, RopeScaling()),
        ({key: "linear", "factor": 2}, LinearRope(2.0)),
        ({key: "dynamic", "factor": 2.0}, DynamicRope(2.0, 256)),
        ({key: "yarn", **yarn}, YarnRope(4.0, 64, whole)),
        ({key: "yarn", **yarn, "attention_factor": 1.5, "beta_fast": None}, YarnRope(4.0, 64, 1.5)),
        ({key: "yarn", **deepseek}, YarnRope(4.0, 64, whole / half, 16.0, 2.0, False)),
        ({key: "yarn", "factor": 0.5}, YarnRope(0.5, 256, 1.0)),
        ({key: "llama3", **yarn, "low_freq_factor": 1, "high_freq_factor": 4}, Llama3Rope(4.0, 1.0, 4.0, 64)),
    ):
        assert DecoderConfig.from_hf(changed(OLD, rope_scaling="absent") | {field: given}).rope_scaling == expected


def test_thetas_and_lengths_beside_the_scaling():
    """Inside wins for theta, outside for the original length, as in transformers."""
    inside = {"rope_type": "default", "rope_theta": 300.0}
    assert DecoderConfig.from_hf(OLD | {"rope_scaling": None, "rope_parameters": inside}).rope_theta == 300.0
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    read = DecoderConfig.from_hf(OLD | {"rope_scaling": yarn, "original_max_position_embeddings": 32})
    assert read.rope_scaling.original_max_position_embeddings == 32


def test_mistrals_window_is_read():
    """Absent it is 4096 tokens, null is none; LLaMA has none whatever is written."""
    mistral = OLD | {"model_type": "mistral"}
    assert DecoderConfig.from_hf(mistral).sliding_window == 4096
    assert DecoderConfig.from_hf(mistral | {"sliding_window": 8}).sliding_window == 8
    assert DecoderConfig.from_hf(mistral | {"sliding_window": None}).sliding_window is None
    assert DecoderConfig.from_hf(OLD | {"sliding_window": 8}).sliding_window is None


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_llama3_frequencies_are_read(field):
    """The original context may stand beside them; without it, it is the model's own."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = changed(OLD, rope_scaling="absent") | {field: scaling}
    assert DecoderConfig.from_hf(config).rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 256)
    config[field] = scaling | {"original_max_position_embeddings": 64}
    assert DecoderConfig.from_hf(config).rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"model_type": "gemma"}, "model_type = 'gemma'"),
        ({"model_type": "absent"}, "model_type = None"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (
            {"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"]},
            "has 'full_att",
        ),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "has 'sliding_"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": "su"}}, "rope type 'su'"),
        ({"rope_scaling": {"type": 3}}, "rope type 3"),
        ({"rope_scaling": {"factor": 2.0}}, "factor = 2.0 in rope_scaling, which is not followed"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor = '2' in rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor = 0 in rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor = 0.5 in rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": [1]}}, "mrope_section = [1]"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention = {"),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 5.0}}, "rope_scaling that differs"),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}},
            "low_freq_factor = 1.0 in rope_scaling, which is not below",
        ),
        ({"rope_theta": 1.0}, "rope_theta = 1.0"),
        ({"hidden_size": "4096"}, "hidden_size = '4096'"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers = 2.5"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads = 3"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5'"),
        ({"is_causal": False}, "is_causal = False"),
        ({"head_dim": 5}, "head width 5"),
        ({"layer_types": "full_attention"}, "layer_types = 'full_attention' where a list is needed"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "max_window_layers = 1"),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention", "full_attention"]},
            "has 'sliding_",
        ),
    ],
)
def test_what_would_change_the_result_is_an_error_that_names_it(changes, named):
    with pytest.raises(UserError, match="config.json") as error:
        DecoderConfig.from_hf(changed(OLD, **changes))
    assert named in str(error.value)


def test_every_parameter_is_layer_stacked_as_documented():
    module = Decoder(DecoderConfig(**DECODER))
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            random_variables(module, 0, method="full_logits")["params"]
        )
    }
    layers = {
        "input_layernorm/scale": (16,),
        "post_attention_layernorm/scale": (16,),
        "self_attn/q_proj/kernel": (16, 16),
        "self_attn/k_proj/kernel": (16, 8),
        "self_attn/v_proj/kernel": (16, 8),
        "self_attn/o_proj/kernel": (16, 16),
        "mlp/gate_proj/kernel": (16, 24),
        "mlp/up_proj/kernel": (16, 24),
        "mlp/down_proj/kernel": (24, 16),
    }
    expected = {f"layers/{name}": (2, *shape) for name, shape in layers.items()}
    expected |= {"embed_tokens/embedding": (61, 16), "norm/scale": (16,), "lm_head/kernel": (16, 61)}
    assert shapes == expected


LLAMA3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
MISTRAL_7B = LLAMA3_8B | {"model_type": "mistral", "vocab_size": 32000, "rope_theta": 10000.0, "sliding_window": 4096}


LLAMA32_1B = LLAMA3_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
QWEN25_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
QWEN3_06B = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (LLAMA3_8B, 8_030_261_248),
        (MISTRAL_7B, 7_241_732_096),
        (LLAMA32_1B, 1_235_814_400),
        (QWEN25_05B, 494_032_768),
        (QWEN3_06B, 596_049_920),
    ],
)
def test_real_sizes_have_the_published_number_of_parameters(config, published):
    """Shapes alone; stored in 4 bits, the layers' kernels stay under 0.16 of their float32 bytes."""
    config = DecoderConfig.from_hf(config, quantize="nf4", lora=LoraConfig())
    variables = abstract_decoder(config)
    assert variables.keys() == {"params"}
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == published
    inputs = [jax.ShapeDtypeStruct((1, 1), np.int32)] * 3
    stored = jax.eval_shape(Decoder(config).init, jax.random.key(0), *inputs)["params"]["layers"]

    def size(tree):
        kernels = [leaf for path, leaf in jax.tree.leaves_with_path(tree) if "kernel" in jax.tree_util.keystr(path)]
        return sum(leaf.size * leaf.dtype.itemsize for leaf in kernels)

    assert 0.5 / 4 < size(stored) / size(variables["params"]["layers"]) <= 0.16
