"""Tiny random generators of every kind that is read against transformers: logits, and greedy answers from the cache.

Every parameter is random, norms and biases included (tests/tiny.py). transformers reads the same folders.
"""

import json

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ragjax.pretrained import load_generator
from tests.tiny import write_tiny_llama

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
SHORT, LONG = 9, 70  # tokens: within and beyond the length that the scaled models were trained on
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WIDE = {"head_dim": 16, "rope_theta": 100.0, "max_position_embeddings": 32}
QWEN2, QWEN3, MISTRAL = {"model_type": "qwen2"}, {"model_type": "qwen3", "head_dim": 12}, {"model_type": "mistral"}
WINDOW = {"use_sliding_window": True, "sliding_window": 4}
KINDS = {
    "Qwen2": QWEN2,
    "Qwen2, untied": {**QWEN2, "tie_word_embeddings": False, "num_key_value_heads": 1},
    "Qwen2, bfloat16 file": {**QWEN2, "torch_dtype": "bfloat16", "rope_theta": 1e6},
    "Qwen2, window named but not used": {**QWEN2, "sliding_window": 4, "max_window_layers": 0},
    "Qwen2, window from a later layer on": {**QWEN2, **WINDOW},
    "Qwen2, window in all layers": {**QWEN2, **WINDOW, "max_window_layers": 0},
    "Qwen2, YaRN": {**QWEN2, **WIDE, "rope_scaling": YARN, "max_position_embeddings": 128},
    "Qwen3": QWEN3,
    "Qwen3, untied, biases": {**QWEN3, "tie_word_embeddings": False, "attention_bias": True},
    "Qwen3, window in all layers": {**QWEN3, **WINDOW, "layer_types": ["sliding_attention"] * 2},
    "Qwen3, full by its layer types": {**QWEN3, **WINDOW, "layer_types": ["full_attention"] * 2},
    "Mistral, no window": {**MISTRAL, "sliding_window": None, "rope_theta": 1e6},
    "Mistral, window": {**MISTRAL, "sliding_window": 4},
    "LLaMA, what is left out": {"rms_norm_eps": "absent", "rope_theta": "absent", "hidden_act": "absent"},
    "linear": {**WIDE, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "linear, new spelling": {
        **WIDE,
        "rope_theta": "absent",
        "rope_scaling": "absent",
        "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 50.0},
    },
    "dynamic": {**WIDE, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "dynamic, narrow heads": {"max_position_embeddings": 32, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "yarn": {**WIDE, "rope_scaling": YARN},
    "yarn, own factors": {
        **WIDE,
        "rope_scaling": YARN | {"attention_factor": 0.7, "beta_fast": 4, "beta_slow": 0.5, "truncate": False},
    },
    "yarn, mscale": {**WIDE, "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.4}},
    "yarn, original beside": {
        **WIDE,
        "original_max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    },
    "llama3": {**WIDE, "rope_scaling": LLAMA3, "max_position_embeddings": 128},
}


@pytest.fixture(autouse=True)
def exact_products():
    """On an accelerator float32 products would be rounded; here the models are compared, not the hardware."""
    with jax.default_matmul_precision("highest"):
        yield


def write(folder, kind):
    folder = write_tiny_llama(folder, seed=11, **{name: value for name, value in kind.items() if value != "absent"})
    absent = [name for name, value in kind.items() if value == "absent"]
    edit_config(folder, *absent)
    return folder


def edit_config(folder, *absent):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    config["architectures"] = [f"{names[config['model_type']]}ForCausalLM"]
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in absent}))


def torch_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_logits_equal_transformers(tmp_path, kind):
    folder = write(tmp_path, kind)
    ours, theirs = load_generator(folder), torch_model(folder)
    for length in (SHORT, LONG):
        tokens = np.random.default_rng(length).integers(0, ours.config.vocab_size, (1, length))
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens)).logits.numpy()
        error = np.abs(np.asarray(ours.logits(tokens)) - expected).max() / np.abs(expected).max()
        print(f"{length} tokens: largest error {error:.2g} of the largest logit")
        assert error < TOLERANCE


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Qwen2, window in all layers", "yarn", "dynamic", "llama3"])
def test_greedy_answers_equal_transformers(tmp_path, kind):
    """Prompts of 25 tokens and 20 new ones: "dynamic" grows on the way, with keys as they were turned when read."""
    folder = write(tmp_path, KINDS[kind])
    ours, theirs = load_generator(folder), torch_model(folder)
    prompt = np.random.default_rng(3).integers(3, ours.config.vocab_size, 25).tolist()
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    expected = expected[0, 25:].tolist()
    assert ours.generate_tokens([prompt], 20) == [expected[: expected.index(2)] if 2 in expected else expected]
