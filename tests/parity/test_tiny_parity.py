"""Tiny random models against torch: hidden states layer by layer, logits, and gradients of the joint loss.

Every parameter is random, norms and biases included (tests/tiny.py). torch reads the same folders through transformers.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.flatten_util import ravel_pytree
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertModel, MPNetModel

from ragjax.data.batches import Example, Shape, make_batch
from ragjax.models.lora import COLLECTION, LoraConfig
from ragjax.pretrained import init_lora, load_embedder, load_generator
from ragjax.training.objectives import AnswerMixture, AnswerObjective
from ragjax.training.step import summed_loss
from tests.tiny import write_tiny_bert, write_tiny_llama, write_tiny_mpnet

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
LAYERS = 3
# Lengths of a batch's rows: of different lengths, padded to an odd S, and of one token each.
ROWS, ONE_TOKEN_ROWS = (7, 1, 4), (1, 1)
FAR_ROWS = (201, 130)  # MPNet's last bucket of relative positions begins at a distance of 91, its formula ends at 128

MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 0.1,
    "high_freq_factor": 0.5,
    "original_max_position_embeddings": 4,
}
LLAMAS = {
    "one key head": {"num_key_value_heads": 1},
    "two key heads": {"num_key_value_heads": 2},
    "as many key heads as query heads": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 12},
    "narrow heads": {"head_dim": 4, "num_key_value_heads": 1},
    "untied head": {"tie_word_embeddings": False},
    "large rope_theta": {"rope_theta": 500000.0},
    "small rope_theta": {"rope_theta": 100.0, "rms_norm_eps": 1e-2},
    "bfloat16 file": {"torch_dtype": "bfloat16"},
    "float16 file": {"torch_dtype": "float16", "tie_word_embeddings": False},
    "attention biases": {"attention_bias": True, "head_dim": 12},
    "MLP biases": {"mlp_bias": True},
    "Llama 3 frequencies": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "Mistral, window of 3": {**MISTRAL, "sliding_window": 3},
    "Mistral, window of 1": {**MISTRAL, "sliding_window": 1, "tie_word_embeddings": False},
    "Mistral, window of more than S": {**MISTRAL, "sliding_window": 64, "head_dim": 12},
    "Mistral without a window": {**MISTRAL, "sliding_window": None, "torch_dtype": "bfloat16"},
    "Mistral, its own window": MISTRAL,
}
BERTS = {
    "float32 file": {},
    "bfloat16 file": {"torch_dtype": "bfloat16"},
    "float16 file": {"torch_dtype": "float16"},
    "two heads": {"num_attention_heads": 2},
    "large epsilon": {"layer_norm_eps": 1e-2, "intermediate_size": 40},
}
MPNETS = {
    "float32 file": {},
    "bfloat16 file": {"torch_dtype": "bfloat16"},
    "float16 file": {"torch_dtype": "float16"},
    "two heads": {"num_attention_heads": 2},
    "large epsilon": {"layer_norm_eps": 1e-2, "intermediate_size": 40},
}


@pytest.fixture(autouse=True)
def exact_products():
    """On an accelerator float32 products would be rounded; here the models are compared, not the hardware."""
    with jax.default_matmul_precision("highest"):
        yield


# ---- forward -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", LLAMAS.values(), ids=LLAMAS.keys())
def test_llama_states_and_logits_equal_torch(tmp_path, overrides):
    folder = write_tiny_llama(tmp_path, seed=1, num_hidden_layers=LAYERS, **overrides)
    compare_llamas(load_generator(folder), torch_llama(folder))


def test_llama_that_transformers_saved_equals_torch(tmp_path):
    """transformers writes the newer spelling of config.json: rope_parameters and dtype."""
    overrides = {"rope_theta": 300.0, "head_dim": 12, "tie_word_embeddings": False}
    old = write_tiny_llama(tmp_path / "old", seed=2, num_hidden_layers=LAYERS, **overrides)
    theirs = torch_llama(old)
    new = tmp_path / "new"
    theirs.save_pretrained(new)
    config = json.loads((new / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 300.0
    assert "rope_theta" not in config
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(old / name, new)
    compare_llamas(load_generator(new), theirs)


@pytest.mark.parametrize("overrides", BERTS.values(), ids=BERTS.keys())
def test_bert_states_equal_torch(tmp_path, overrides):
    folder = write_tiny_bert(tmp_path, seed=3, num_hidden_layers=LAYERS, **overrides)
    compare_encoders(load_embedder(folder), torch_bert(folder), (ROWS, ONE_TOKEN_ROWS))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("overrides", MPNETS.values(), ids=MPNETS.keys())
def test_mpnet_states_equal_torch(tmp_path, overrides, shards):
    folder = write_tiny_mpnet(tmp_path, seed=8, num_hidden_layers=LAYERS, **overrides)
    if shards > 1:
        cut_into_shards(folder, shards)
    options = {"dtype": torch.float32, "attn_implementation": "eager", "add_pooling_layer": False}
    theirs = MPNetModel.from_pretrained(folder, **options).eval()
    compare_encoders(load_embedder(folder), theirs, (FAR_ROWS, ROWS, ONE_TOKEN_ROWS))


def cut_into_shards(folder, count):
    """Spreads the weights of a folder over several files with an index, as large models have them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(count):
        name = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        part = {key: weights[key] for key in sorted(weights)[shard::count]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def compare_encoders(ours, theirs, batches):
    for lengths in batches:
        tokens, real = random_batch(lengths, ours.config.vocab_size)
        tokens[tokens == 1] = 2  # transformers' MPNet takes the padding token, id 1, for padding wherever it stands
        with torch.no_grad():
            states = theirs(torch.tensor(tokens), torch.tensor(real), output_hidden_states=True).hidden_states
        for layers in range(1 if lengths == batches[0] else LAYERS, LAYERS + 1):
            stack = jax.tree.map(lambda leaf, n=layers: leaf[:n], ours.params["encoder"]["layer"])
            encoder = {**ours.params["encoder"], "layer": stack}
            hidden = apply_first_layers(ours, layers, {**ours.params, "encoder": encoder}, tokens, real)
            assert_close(hidden, states[layers], real, f"{lengths}, layer {layers}")


def compare_llamas(ours, theirs):
    for lengths in (ROWS, ONE_TOKEN_ROWS):
        tokens, real = random_batch(lengths, ours.config.vocab_size)
        with torch.no_grad():
            output = theirs(torch.tensor(tokens), attention_mask=torch.tensor(real), output_hidden_states=True)
            # transformers' last state is the only one behind the final norm; ours always is.
            states = [*map(theirs.model.norm, output.hidden_states[:-1]), output.hidden_states[-1]]
        for layers in range(1, LAYERS + 1) if lengths == ROWS else ():
            stack = jax.tree.map(lambda leaf, n=layers: leaf[:n], ours.params["layers"])
            hidden = apply_first_layers(ours, layers, {**ours.params, "layers": stack}, tokens, real)
            assert_close(hidden, states[layers], real, f"{lengths}, layer {layers}")
        assert_close(ours.logits(tokens, np.array(lengths)), output.logits, real, f"{lengths}, logits")


def apply_first_layers(model, layers, params, tokens, real):
    """Hidden states [R, S, D] of the same kind of model with its first `layers` layers."""
    module = type(model.module)(dataclasses.replace(model.config, num_hidden_layers=layers))
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return jax.jit(module.apply)({"params": params}, tokens, real, positions)


def random_batch(lengths, vocabulary):
    """Token ids [R, S] (padding is random, too) and 1 for the real ones."""
    length = max(lengths)
    tokens = np.random.default_rng(length).integers(0, vocabulary, (len(lengths), length))
    return tokens, (np.arange(length) < np.array(lengths)[:, None]).astype(int)


def assert_close(ours, theirs, real, what):
    """At the real positions, against torch's values."""
    real = real.astype(bool)
    error = np.abs(np.asarray(ours)[real] - theirs.numpy()[real]).max()
    print(f"{what}: largest error {error:.2g}, largest value {theirs.abs().max():.2g}")
    assert error < TOLERANCE, what


# ---- gradients ---------------------------------------------------------------------------------------------

SCALE = 3.0
LORA = LoraConfig(rank=3, alpha=6.0)


@pytest.mark.parametrize("trained", ["lora", "params"])
@pytest.mark.parametrize("name", ["rag_token", "rag_sequence"])
def test_joint_loss_and_gradients_equal_torch_autograd(tmp_path, name, trained):
    """B = 3 questions, K = 2 passages, packed rows and a filler question here; one sequence at a time in torch."""
    bert_folder = write_tiny_bert(tmp_path / "bert", seed=4)
    llama_folder = write_tiny_llama(tmp_path / "llama", seed=5, num_key_value_heads=2)
    embedder = load_embedder(bert_folder)
    generator = load_generator(llama_folder, lora=LORA if trained == COLLECTION else None, remat="full")
    lora = random_tree(init_lora(generator, seed=0)) if trained == COLLECTION else None
    examples = random_examples(embedder.config.vocab_size, generator.config.vocab_size, embedder.config.hidden_size)
    longest = max(len(prompt) + len(e.answer) - 1 for e in examples for prompt in e.prompts)
    batch = make_batch(examples, Shape(4, 2 * longest, 6), size=4, question_length=9)
    assert (batch.rows.segment_ids.max(axis=1) > 1).any()

    frozen = {"generator": {"params": generator.params}} if lora else {}
    trainable = {"embedder": {"params": embedder.params}, "generator": {trained: lora or generator.params}}
    objective = AnswerObjective(embedder.module, generator.module, AnswerMixture(name, SCALE))
    gradient_of = jax.jit(jax.value_and_grad(summed_loss, argnums=1, has_aux=True), static_argnums=0)
    (loss, _), gradients = gradient_of(objective, trainable, frozen, batch, None)

    bert, llama = torch_bert(bert_folder), torch_llama(llama_folder)
    adapters = add_adapters(llama, lora) if lora else {}
    expected = torch_joint_loss(bert, llama, examples, name)
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=TOLERANCE)
    theirs = load_embedder(folder_of_gradients(bert, bert_folder, tmp_path / "bert_gradients")).params
    assert_gradients_equal(gradients["embedder"]["params"], theirs)
    if lora:
        assert_gradients_equal(gradients["generator"][COLLECTION], gradients_of_adapters(lora, adapters))
    else:
        theirs = load_generator(folder_of_gradients(llama, llama_folder, tmp_path / "llama_gradients")).params
        assert_gradients_equal(gradients["generator"]["params"], theirs)


def torch_joint_loss(bert, llama, examples, name):
    """Sum of the questions' losses, Lewis et al. 2020, section 2.1, one sequence at a time."""
    total = torch.zeros(())
    for example in examples:
        states = bert(torch.tensor([example.question_tokens])).last_hidden_state[0]
        vector = torch.nn.functional.normalize(states.mean(dim=0), dim=0)
        docs = (SCALE * torch.tensor(example.passage_vectors) @ vector).log_softmax(dim=0)
        answers = torch.stack([torch_answer_log_probs(llama, prompt, example.answer) for prompt in example.prompts])
        if name == "rag_token":
            total = total - (docs[:, None] + answers).logsumexp(dim=0).sum()
        else:
            total = total - (docs + answers.sum(dim=1)).logsumexp(dim=0)
    return total


def torch_answer_log_probs(llama, prompt, answer):
    logits = llama(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(dim=-1)[torch.arange(len(answer)), torch.tensor(answer)]


def random_examples(bert_vocabulary, llama_vocabulary, width):
    """Questions of different lengths under two prompts each, answers of 1, 3 and 6 tokens."""
    generator = np.random.default_rng(6)

    # From 1: torch gives the padding token's embedding, id 0, no gradient even where it is a word.
    def ids(vocabulary, length):
        return generator.integers(1, vocabulary, length).tolist()

    examples = []
    for index, (question, prompts, answer) in enumerate([(9, (11, 4), 1), (2, (3, 17), 6), (5, (8, 1), 3)]):
        vectors = generator.standard_normal((2, width)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        texts = [ids(llama_vocabulary, length) for length in prompts]
        examples.append(Example(index, ids(bert_vocabulary, question), vectors, texts, ids(llama_vocabulary, answer)))
    return examples


class AdaptedLinear(torch.nn.Module):
    """y = linear(x) + (alpha / rank) * x A B, Hu et al. 2021, section 4.1."""

    def __init__(self, linear, a, b):
        super().__init__()
        self.linear = linear
        self.a, self.b = torch.nn.Parameter(torch.tensor(a)), torch.nn.Parameter(torch.tensor(b))

    def forward(self, x):
        return self.linear(x) + LORA.alpha / LORA.rank * (x @ self.a @ self.b)


def add_adapters(llama, lora):
    """Puts the adapters of our tree beside torch's projections; returns them by (room, projection), a list each."""
    adapters = {}
    for room, projections in lora["layers"].items():
        for name, leaves in projections.items():
            adapters[room, name] = []
            for layer, torch_layer in enumerate(llama.model.layers):
                parent = getattr(torch_layer, room)
                linear = getattr(parent, name)
                adapted = AdaptedLinear(linear, np.array(leaves["lora_a"][layer]), np.array(leaves["lora_b"][layer]))
                setattr(parent, name, adapted)
                adapters[room, name].append(adapted)
    assert len(adapters) == len(LORA.targets)
    return adapters


def gradients_of_adapters(lora, adapters):
    """torch's gradients in the shape of our tree."""
    tree = jax.tree.map(np.zeros_like, lora)
    for (room, name), modules in adapters.items():
        for leaf, attribute in (("lora_a", "a"), ("lora_b", "b")):
            grads = [getattr(module, attribute).grad.numpy() for module in modules]
            tree["layers"][room][name][leaf] = np.stack(grads)
    return tree


def folder_of_gradients(model, folder, copy):
    """A copy of a model folder whose weights are torch's gradients, so that the loader lays them out as our tree."""
    shutil.copytree(folder, copy)
    grads = {name: parameter.grad.contiguous() for name, parameter in model.named_parameters()}
    save_file(grads, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def random_tree(tree):
    """Adapters of which neither factor is zero."""
    flat, unravel = ravel_pytree(tree)
    return unravel(jnp.asarray(0.2 * np.random.default_rng(7).standard_normal(flat.shape), jnp.float32))


def assert_gradients_equal(ours, theirs):
    """Leaf by leaf to 1e-4 of the leaf's norm, and in direction as a whole.

    A key bias changes nothing under a softmax: its gradient is 0 in theory and rounding in practice, which is what
    the part in the norm of all gradients is for.
    """
    whole, expected = ravel_pytree(ours)[0], ravel_pytree(theirs)[0]
    scale = np.linalg.norm(expected)
    assert scale > 0
    for (path, leaf), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        error = np.linalg.norm(leaf - other)
        assert error <= 1e-4 * np.linalg.norm(other) + 1e-7 * scale, jax.tree_util.keystr(path)
    print(f"gradients: relative error {np.linalg.norm(whole - expected) / scale:.2g}")
    assert whole @ expected / (np.linalg.norm(whole) * scale) > 0.9999


# ---- torch -------------------------------------------------------------------------------------------------


def torch_llama(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def torch_bert(folder):
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return BertModel.from_pretrained(folder, add_pooling_layer=False, **options).eval()
