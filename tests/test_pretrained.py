"""The embedder, of either model type: one vector a text whatever the batch, where texts are cut, sizes."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from ragjax.costs import ModelSize
from ragjax.errors import UserError
from ragjax.models.bert import Bert, BertConfig
from ragjax.models.lora import LoraConfig
from ragjax.models.mpnet import MPNet, MPNetConfig
from ragjax.pretrained import init_lora, load_embedder, load_generator
from ragjax.weights import read_config, resolve_model
from ragjax.weights.load import read_safetensors_header
from tests.tiny import require_model, write_tiny_bert, write_tiny_llama, write_tiny_mpnet

TEXTS = ["The river runs past the old town.", "", "a", "\N{GRINNING FACE}", "river " * 30, "Who wrote it? " * 40]

BASES = {
    "minilm": (Bert, BertConfig, 22_713_216, {
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    }),
    "mpnet": (MPNet, MPNetConfig, 109_486_464, {
        "model_type": "mpnet",
        "vocab_size": 30527,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 514,
        "layer_norm_eps": 1e-5,
    }),
}  # fmt: skip


@pytest.fixture(scope="module", params=[write_tiny_bert, write_tiny_mpnet], ids=["bert", "mpnet"])
def folder(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def embedder(folder):
    return load_embedder(folder)


def test_vectors_do_not_depend_on_the_batch_or_the_order(embedder):
    vectors = embedder.encode(TEXTS, batch_size=64)
    assert vectors.shape == (len(TEXTS), 32)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-6)
    assert min(np.abs(vectors[i] - vectors[j]).max() for i in range(6) for j in range(i)) > 1e-3
    for batch_size in (1, 4):
        np.testing.assert_allclose(embedder.encode(TEXTS, batch_size=batch_size), vectors, rtol=0, atol=1e-6)
    np.testing.assert_allclose(embedder.encode(TEXTS[::-1])[::-1], vectors, rtol=0, atol=1e-6)
    assert embedder.encode([]).shape == (0, 32)


def test_a_text_is_cut_at_max_seq_length_and_nowhere_else(folder, embedder):
    """tokenizer.json says 16, sentence_bert_config.json 64."""
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"]["max_length"] == 16
    assert embedder.max_seq_length == 64
    (ids,) = embedder.passage_tokens(["river " * 100])
    assert len(ids) == 64
    one, other, third = embedder.encode([f"{'river ' * 62}{end}" for end in ("town", "sea", "")])
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(one, third)
    assert np.abs(embedder.encode([f"{'river ' * 61}sea"])[0] - one).max() > 1e-4


def test_without_a_setting_a_text_may_take_every_position(folder, tmp_path):
    """The tiny MPNet has 514 rows of positions, the tiny BERT 512; both serve 512 tokens."""
    longer = shutil.copytree(folder, tmp_path / "copy")
    (longer / "sentence_bert_config.json").unlink()
    embedder = load_embedder(longer)
    assert embedder.max_seq_length == 512
    assert np.isfinite(embedder.encode(["river " * 600])).all()


def test_size_counts_the_layers_and_nothing_else(embedder):
    wide, inner, layers = 32, 48, 2
    weights = 4 * (wide * wide + wide) + wide * inner + inner + inner * wide + wide + 2 * 2 * wide
    assert embedder.size == ModelSize(layers * weights, 0, 0, layers, wide)


def test_a_generator_whose_config_names_no_end_ends_as_its_tokenizer_does(tmp_path):
    folder = write_tiny_llama(tmp_path / "llama", eos_token_id=None)
    generator = load_generator(folder)
    assert generator.end_ids == (generator.eos_token_id,) == (generator.tokenizer.eos_token_id,)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="config.json names no token that ends a text: set its eos_token_id"):
        load_generator(folder)


def test_a_generator_in_the_embedders_place_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.json has model_type = 'llama'.*bert, mpnet"):
        load_embedder(write_tiny_llama(tmp_path))


@pytest.mark.parametrize("name", BASES)
def test_the_published_number_of_parameters(name):
    """The pooler is counted in the published numbers; the modules have none."""
    module, config_type, published, hf = BASES[name]
    inputs = [jax.ShapeDtypeStruct((1, 1), np.int32)] * 3
    shapes = jax.eval_shape(module(config_type.from_hf(hf)).init, jax.random.key(0), *inputs)
    pooler = hf["hidden_size"] ** 2 + hf["hidden_size"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) + pooler == published


@pytest.mark.real_weights
@pytest.mark.parametrize("name", BASES)
def test_the_real_files_have_the_published_number_of_parameters(name):
    require_model(name)
    _, _, published, hf = BASES[name]
    source = resolve_model(name)
    config = read_config(source)
    assert {field: config[field] for field in hf} == hf
    stored = [entry for file in source.files for entry in read_safetensors_header(file)]
    assert sum(int(np.prod(entry.shape)) for entry in stored if entry.name != "embeddings.position_ids") == published


def test_another_tokenizer_or_another_end_token_makes_another_model(tmp_path):
    """What is kept (vectors, predictions, likelihoods) goes by these keys."""
    embedder, generator = write_tiny_bert(tmp_path / "bert"), write_tiny_llama(tmp_path / "llama")
    before = load_embedder(embedder).key, load_generator(generator).key
    tokenizer = json.loads((embedder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["normalizer"]["lowercase"] = not tokenizer["normalizer"]["lowercase"]
    (embedder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (generator / "generation_config.json").write_text('{"eos_token_id": [2, 5]}', encoding="utf-8")
    assert load_embedder(embedder).key != before[0]
    assert load_generator(generator).key != before[1]


def test_a_generators_key_names_its_adapters_once_they_say_something(tmp_path):
    """Fresh ones change no probability, whatever seed has drawn them."""
    bare = load_generator(write_tiny_llama(tmp_path), lora=LoraConfig(rank=2))
    fresh = [dataclasses.replace(bare, lora=init_lora(bare, seed)) for seed in (0, 1)]
    assert fresh[0].key == fresh[1].key

    def moved(generator, size):
        lora = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf + size * (path[-1].key == "lora_b"), generator.lora
        )
        return dataclasses.replace(generator, lora=lora)

    keys = [moved(generator, size).key for generator in fresh for size in (1e-3, 2e-3)]
    assert len({fresh[0].key, *keys}) == 5
    tokens = np.arange(1, 9)[None]
    same, other = fresh[1].logits(tokens), moved(fresh[0], 1e-3).logits(tokens)
    np.testing.assert_array_equal(fresh[0].logits(tokens), same)
    assert np.abs(np.asarray(other) - np.asarray(same)).max() > 0


def test_an_embedders_key_names_its_trained_weights(tmp_path):
    embedder = load_embedder(write_tiny_bert(tmp_path / "bert"))
    moved = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].add(1e-6), embedder.params)
    trained = dataclasses.replace(embedder, params=moved)
    assert trained.key != embedder.key and trained.passage_key != embedder.passage_key
    assert dataclasses.replace(embedder, params=dict(embedder.params)).key == embedder.key


def test_one_text_is_no_list_of_texts(tmp_path):
    """It would be read letter by letter."""
    embedder = load_embedder(write_tiny_bert(tmp_path / "bert"))
    generator = load_generator(write_tiny_llama(tmp_path / "llama"))
    for call in (embedder.encode, embedder.encode_queries, embedder.encode_passages, generator.generate):
        with pytest.raises(TypeError, match="put a single one into a list"):
            call("The old town")


@pytest.mark.parametrize("value", ["2", [2, "5"], True, -1, 2.0])
def test_an_end_token_that_is_no_id_is_named(tmp_path, value):
    generator = write_tiny_llama(tmp_path / "llama")
    (generator / "generation_config.json").write_text(json.dumps({"eos_token_id": value}), encoding="utf-8")
    with pytest.raises(UserError, match=r"generation_config\.json has eos_token_id = .* a token id or a list of them"):
        load_generator(generator)


@pytest.mark.parametrize(
    ("load", "write", "changes", "words"),
    [
        *((load_embedder, write_tiny_bert, {"model_type": kind}, "reads embedders of the types 'bert' and 'mpnet'")
          for kind in ("distilbert", "roberta", "xlm-roberta", "nomic_bert", "modernbert", None, ["bert"])),
        *((load_generator, write_tiny_llama, {"model_type": kind}, "of the types 'llama', 'mistral'")
          for kind in ("phi", "phi3", "gemma", "gpt2", "mixtral")),
        (load_generator, write_tiny_llama, {"rope_scaling": {"type": "longrope"}}, "only 'default', 'linear'"),
        (load_generator, write_tiny_bert, {}, "only 'llama', 'mistral', 'qwen2' and 'qwen3' are supported"),
    ],
)  # fmt: skip
def test_other_families_are_refused_by_name_before_weights_are_read(tmp_path, load, write, changes, words):
    folder = write(tmp_path)
    (folder / "model.safetensors").write_bytes(b"not read")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError) as caught:
        load(folder)
    message = str(caught.value)
    assert str(folder / "config.json") in message and words in message and "\n" not in message
    for value in changes.values():
        assert repr(value) in message or "'longrope'" in message
