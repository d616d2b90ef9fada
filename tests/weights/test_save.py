"""ragjax.weights.save: the way out is the way in backwards, and what was not trained is not touched."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ragjax.errors import UserError
from ragjax.files import write_folder
from ragjax.pretrained import load_embedder, load_generator
from ragjax.weights import resolve_model
from ragjax.weights.save import (
    Trained,
    adapter_tensors,
    plan_safetensors,
    plan_weights,
    trained_tensors,
)
from tests.tiny import STORED, write_tiny_bert, write_tiny_gguf, write_tiny_llama
from tests.tiny_exports import nudged, random_adapters

DTYPES = list(STORED)
TINY = {"bert": (write_tiny_bert, load_embedder), "llama": (write_tiny_llama, load_generator)}


def export(out, source, trained=None, max_shard_bytes=10**9):
    """The tensors that an export of the source holds, read by the safetensors library."""
    tensors = trained_tensors(resolve_model(source), trained or Trained())
    write_folder(out, plan_weights("model", tensors, max_shard_bytes))
    return read(out / "model")


def read(folder):
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not weights.keys() & part.keys()
        weights |= part
    return weights


def shard(folder, parts):
    """Turns model.safetensors into shards with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    for part in range(parts):
        names, file = sorted(weights)[part::parts], f"model-{part + 1:05}-of-{parts:05}.safetensors"
        places |= dict.fromkeys(names, file)
        save_file({name: weights[name] for name in names}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def assert_same(one, other, names=None):
    """Equal to the last bit, dtypes included."""
    assert one.keys() == other.keys()
    for name in one if names is None else names:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].shape == other[name].shape, name
        assert one[name].tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 3])
def test_loaded_parameters_are_saved_as_they_were(tmp_path, kind, dtype, parts):
    """All of them pass through our stacked and transposed leaves and come out under their names, bit for bit."""
    write, load = TINY[kind]
    folder = write(tmp_path / "source", torch_dtype=dtype)
    before = read(folder)
    if parts > 1:
        shard(folder, parts)
    assert_same(export(tmp_path / "out", folder, Trained(load(folder).params)), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_not_trained_is_copied(tmp_path, dtype):
    folder = write_tiny_bert(tmp_path / "source", torch_dtype=dtype)
    exported = export(tmp_path / "out", folder)
    assert_same(exported, read(folder))
    assert {"pooler.dense.weight", "embeddings.position_ids"} <= exported.keys()
    assert exported["embeddings.position_ids"].dtype == np.int64


def test_a_trained_leaf_changes_its_own_parameters_alone(tmp_path):
    folder = write_tiny_bert(tmp_path / "source", num_hidden_layers=3)
    before, params = read(folder), nudged(load_embedder(folder).params)
    kernel = {"kernel": params["encoder"]["layer"]["output"]["dense"]["kernel"]}
    partly = {"encoder": {"layer": {"output": {"dense": kernel}}}}
    exported = export(tmp_path / "out", folder, Trained(partly))
    changed = {f"encoder.layer.{layer}.output.dense.weight" for layer in range(3)}
    assert_same(exported, before, before.keys() - changed)
    for layer in range(3):
        saved = exported[f"encoder.layer.{layer}.output.dense.weight"]
        np.testing.assert_array_equal(saved, kernel["kernel"][layer].T)
        assert (saved != before[f"encoder.layer.{layer}.output.dense.weight"]).any()


def test_names_keep_the_spelling_of_the_source(tmp_path):
    folder = write_tiny_bert(tmp_path / "source")
    spelled = {}
    for name, weight in read(folder).items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        spelled[f"bert.{name}"] = weight
    save_file(spelled, folder / "model.safetensors")
    params = nudged(load_embedder(folder).params)
    exported = export(tmp_path / "out", folder, Trained(params))
    assert exported.keys() == spelled.keys()
    np.testing.assert_array_equal(
        exported["bert.embeddings.LayerNorm.gamma"], params["embeddings"]["LayerNorm"]["scale"]
    )
    assert exported["bert.pooler.dense.bias"].tobytes() == spelled["bert.pooler.dense.bias"].tobytes()


def test_a_tied_head_that_the_file_holds_follows_the_trained_embedding(tmp_path):
    folder = write_tiny_llama(tmp_path / "source")
    weights = read(folder)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors")
    params = nudged(load_generator(folder).params)
    exported = export(tmp_path / "out", folder, Trained(params))
    np.testing.assert_array_equal(exported["lm_head.weight"], params["embed_tokens"]["embedding"])
    np.testing.assert_array_equal(exported["model.embed_tokens.weight"], params["embed_tokens"]["embedding"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_are_merged_in_float32_and_stored_as_the_source_is(tmp_path, dtype):
    folder = write_tiny_llama(tmp_path / "source", torch_dtype=dtype, tie_word_embeddings=False)
    before = read(folder)
    lora = random_adapters(load_generator(folder).params, rank=3, targets=("q_proj", "down_proj"))
    exported = export(tmp_path / "out", folder, Trained(lora=lora, lora_scale=1.5))
    changed = {
        f"model.layers.{layer}.{part}.weight": lora["layers"][room][name]
        for layer in range(2)
        for part, room, name in (("self_attn.q_proj", "self_attn", "q_proj"), ("mlp.down_proj", "mlp", "down_proj"))
    }
    assert_same(exported, before, before.keys() - changed.keys())
    for name, pair in changed.items():
        layer = int(name.split(".")[2])
        delta = pair["lora_a"][layer].astype(np.float64) @ pair["lora_b"][layer].astype(np.float64)
        wanted = before[name].astype(np.float64) + 1.5 * delta.T
        assert exported[name].dtype == before[name].dtype
        # Half a unit in the last place of the stored number, and float32's own rounding.
        unit = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
        np.testing.assert_allclose(exported[name].astype(np.float64), wanted, rtol=1.01 * unit, atol=2e-7)
        assert np.abs(delta).max() > 0.01


def test_a_value_that_the_dtype_cannot_hold_is_refused(tmp_path):
    folder = write_tiny_llama(tmp_path / "source", torch_dtype="float16")
    params = nudged(load_generator(folder).params)
    params["layers"]["mlp"]["up_proj"]["kernel"][1, 0, 0] = 70000.0
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight does not fit into F16"):
        export(tmp_path / "out", folder, Trained(params))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_belongs_to_no_parameter_is_a_bug(tmp_path):
    folder = write_tiny_llama(tmp_path / "source")
    params = load_generator(folder).params
    with pytest.raises(ValueError, match=r"layers/input_layernorm/scale.*2"):
        export(tmp_path / "out", folder, Trained({"layers": {"input_layernorm": {"scale": np.ones((3, 32))}}}))
    with pytest.raises(ValueError, match="norm/scales"):
        export(tmp_path / "out", folder, Trained({"norm": {"scales": np.ones(32)}}))
    with pytest.raises(ValueError, match="has the shape"):
        export(tmp_path / "out", folder, Trained({"norm": {"scale": np.ones(31)}}))
    lora = random_adapters(params, rank=2, targets=("q_proj",))
    lora["layers"]["self_attn"]["x_proj"] = lora["layers"]["self_attn"].pop("q_proj")
    with pytest.raises(ValueError, match="x_proj"):
        export(tmp_path / "out", folder, Trained(lora=lora, lora_scale=1.0))


def test_a_damaged_source_leaves_nothing(tmp_path):
    folder = write_tiny_llama(tmp_path / "source")
    data = (folder / "model.safetensors").read_bytes()
    tensors = trained_tensors(resolve_model(folder), Trained())
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(UserError, match="became shorter"):  # after it was looked at
        write_folder(tmp_path / "out", plan_weights("model", tensors))
    with pytest.raises(UserError, match="is truncated"):
        trained_tensors(resolve_model(folder), Trained())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [1, 9000, 40000])
def test_shards_keep_to_their_limit(tmp_path, limit):
    folder = write_tiny_llama(tmp_path / "source")
    before = read(folder)
    assert_same(export(tmp_path / "out", folder, max_shard_bytes=limit), before)
    index = json.loads((tmp_path / "out" / "model" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out" / "model").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
    ]
    for file in files:
        part = load_file(file)
        assert {index["weight_map"][name] for name in part} == {file.name}
        assert len(part) == 1 or sum(weight.nbytes for weight in part.values()) <= limit
    assert index["weight_map"].keys() == before.keys()
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in before.values())
    # What is exported is a source again.
    assert_same(export(tmp_path / "again", fill(tmp_path / "out" / "model", folder)), before)


def fill(folder, source):
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def test_one_file_has_no_index(tmp_path):
    export(tmp_path / "out", write_tiny_llama(tmp_path / "source"))
    assert [path.name for path in (tmp_path / "out" / "model").iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "out" / "model" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}  # without it transformers refuses the file


def test_every_parameter_lies_at_a_multiple_of_its_numbers_size(tmp_path):
    odd = {
        "a": np.zeros(3, np.uint8),
        "b": np.ones((5, 1), ml_dtypes.bfloat16),
        "c": np.ones(3, np.int64),
        "d": np.array(2, np.float32),
        "e": np.zeros((0, 4), np.float32),
    }
    folder = write_tiny_bert(tmp_path / "source")
    weights = read(folder) | {f"cls.{name}": value for name, value in odd.items()}
    save_file(weights, folder / "model.safetensors")
    shard(folder, 3)  # behind one another, narrow numbers stand before wide ones
    assert_same(export(tmp_path / "out", folder), weights)
    data = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert (8 + length) % 8 == 0
    for name, value in weights.items():
        assert header[name]["data_offsets"][0] % value.itemsize == 0, name


def test_gguf_comes_out_as_float32_under_hugging_faces_names(tmp_path):
    folder = write_tiny_llama(tmp_path / "llama", seed=4, tie_word_embeddings=False)
    exact = write_tiny_gguf(tmp_path / "exact.gguf", seed=4, tie_word_embeddings=False)
    assert_same(export(tmp_path / "exact", exact), read(folder))
    coarse = write_tiny_gguf(tmp_path / "coarse.gguf", seed=4, kind="Q8_0")
    exported = export(tmp_path / "coarse", coarse)
    assert {weight.dtype for weight in exported.values()} == {np.dtype(np.float32)}
    params = load_generator(coarse).params
    np.testing.assert_array_equal(
        exported["model.layers.1.self_attn.k_proj.weight"], params["layers"]["self_attn"]["k_proj"]["kernel"][1].T
    )
    assert_same(export(tmp_path / "through", coarse, Trained(params)), exported)


def test_adapters_have_pefts_names_and_orientation(tmp_path):
    params = load_generator(write_tiny_llama(tmp_path / "source")).params
    lora = random_adapters(params, rank=3, targets=("k_proj", "down_proj"))
    write_folder(tmp_path / "out", [plan_safetensors("adapter_model.safetensors", adapter_tensors(lora, "llama"))])
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    wanted = {}
    for layer in range(2):
        for room, name in (("self_attn", "k_proj"), ("mlp", "down_proj")):
            for part, ours in (("A", "lora_a"), ("B", "lora_b")):
                key = f"base_model.model.model.layers.{layer}.{room}.{name}.lora_{part}.weight"
                wanted[key] = np.ascontiguousarray(lora["layers"][room][name][ours][layer].T)
    assert wanted["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"].shape == (3, 32)
    assert_same(saved, wanted)


@pytest.mark.parametrize("how", ["copied", "merged"])
def test_one_tensor_at_a_time_is_in_memory(tmp_path, how):
    """Ten layers of equal matrices: what is held at once does not grow with their number."""
    folder = write_tiny_llama(
        tmp_path / "source", num_hidden_layers=10, intermediate_size=4096, hidden_size=64, head_dim=8
    )
    lora = {}
    if how == "merged":
        lora = random_adapters(load_generator(folder).params, rank=2, targets=("gate_proj", "up_proj", "down_proj"))
    tensors = trained_tensors(resolve_model(folder), Trained(lora=lora, lora_scale=1.0))
    largest, total = max(tensor.nbytes for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
    assert total > 25 * largest
    tracemalloc.start()
    try:
        write_folder(tmp_path / "out", plan_weights("model", tensors))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * largest
