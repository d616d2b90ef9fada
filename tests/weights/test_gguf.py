"""ragjax.weights.gguf: settings, tensors and damage of GGUF files, on small ones in llama.cpp's layout."""

import os
import random
import struct

import gguf as package
import numpy as np
import pytest

from ragjax.errors import UserError
from ragjax.weights import gguf, read_config, resolve_model
from tests.tiny import llama_config, llama_cpp_permute, llama_tokenizer, llama_weights, write_tiny_gguf


def write_bare_gguf(path, edit, architecture="llama"):
    """A GGUF file with the settings of a LLaMA and its embedding only, as `edit(writer)` then completes it."""
    writer = package.GGUFWriter(str(path), architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((10, 32), np.float32))
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        gguf.read_config(gguf.read_gguf(path))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_settings_are_those_of_the_folder(tmp_path, tied):
    overrides = {"tie_word_embeddings": tied, "num_key_value_heads": 1, "rope_theta": 5000.0}
    source = resolve_model(write_tiny_gguf(tmp_path / "tiny.gguf", **overrides))
    written = llama_config(llama_tokenizer()) | overrides
    assert read_config(source) == written | {"head_dim": 8, "pad_token_id": 2, "end_token_ids": [2]}


def test_defaults_of_settings_that_files_leave_out(tmp_path):
    config = gguf.read_config(gguf.read_gguf(write_bare_gguf(tmp_path / "a.gguf", lambda writer: None)))
    assert (config["num_key_value_heads"], config["head_dim"], config["rope_theta"]) == (4, 8, 10000.0)
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (10, True)
    assert "eos_token_id" not in config


def test_a_head_width_of_its_own(tmp_path):
    def wide(writer):
        writer.add_key_length(16)
        writer.add_value_length(16)
        writer.add_rope_dimension_count(16)

    assert gguf.read_config(gguf.read_gguf(write_bare_gguf(tmp_path / "a.gguf", wide)))["head_dim"] == 16


def test_two_end_tokens(tmp_path):
    def ends(writer):
        writer.add_eos_token_id(7)
        writer.add_eot_token_id(3)

    path = write_bare_gguf(tmp_path / "a.gguf", ends)
    config = read_config(resolve_model(path))
    assert (config["eos_token_id"], config["end_token_ids"]) == ([7, 3], [7, 3])


def test_settings_that_say_nothing_are_let_through(tmp_path):
    def neutral(writer):
        writer.add_expert_count(0)
        writer.add_rope_scaling_type(package.RopeScalingType.NONE)

    assert gguf.read_config(gguf.read_gguf(write_bare_gguf(tmp_path / "a.gguf", neutral)))["hidden_size"] == 32


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda w: w.add_expert_count(8), "llama.expert_count = 8"),
        (lambda w: w.add_rope_scaling_type(package.RopeScalingType.YARN), "llama.rope.scaling.type = yarn"),
        (lambda w: w.add_rope_scaling_factor(4.0), "llama.rope.scaling.factor = 4.0"),
        (lambda w: w.add_sliding_window(16), "llama.attention.sliding_window = 16"),
        (lambda w: w.add_float32("llama.invented_scale", 2.0), "llama.invented_scale = 2.0"),
        (lambda w: w.add_rope_dimension_count(4), "llama.rope.dimension_count = 4"),
        (lambda w: w.add_value_length(4), "llama.attention.value_length = 4"),
        (lambda w: w.add_head_count_kv([4, 2]), "llama.attention.head_count_kv is [4, 2] where one number is needed"),
    ],
)
def test_a_setting_that_is_not_followed_is_named(tmp_path, edit, words):
    assert words in refusal(write_bare_gguf(tmp_path / "a.gguf", edit))


def test_another_architecture_is_named(tmp_path):
    message = refusal(write_bare_gguf(tmp_path / "a.gguf", lambda writer: None, architecture="qwen2"))
    assert "architecture 'qwen2'" in message


def test_a_missing_setting_is_named(tmp_path):
    path = tmp_path / "a.gguf"
    writer = package.GGUFWriter(str(path), "llama")
    writer.add_tensor("token_embd.weight", np.zeros((10, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "llama.embedding_length is None" in refusal(path)


def test_a_file_without_tensors_is_no_model(tmp_path):
    path = tmp_path / "vocabulary.gguf"
    writer = package.GGUFWriter(str(path), "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "has no tensor token_embd.weight" in refusal(path)
    assert gguf.quantization(gguf.read_gguf(path)) is None


# ---- tensors --------------------------------------------------------------------------------------------------------


def test_tensors_have_hugging_faces_names_shapes_and_values(tmp_path):
    file = gguf.read_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", seed=5))
    config = gguf.read_config(file)
    weights = llama_weights(llama_config(llama_tokenizer()), seed=5)
    stored = {entry.name: entry for entry in gguf.stored_tensors(file)}
    assert stored.keys() == weights.keys()
    for name, entry in stored.items():
        assert entry.shape == weights[name].shape
        np.testing.assert_array_equal(gguf.read_tensor(file, entry.key, config), weights[name], err_msg=name)


def test_an_unknown_tensor_keeps_its_name(tmp_path):
    def extra(writer):
        writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))

    file = gguf.read_gguf(write_bare_gguf(tmp_path / "a.gguf", extra))
    assert [entry.name for entry in gguf.stored_tensors(file)] == ["model.embed_tokens.weight", "rope_freqs.weight"]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_unpermute_undoes_llama_cpps_order(heads):
    weight = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    np.testing.assert_array_equal(gguf.unpermute(llama_cpp_permute(weight, heads), heads), weight)


def test_unpermuted_weights_rotated_by_halves_score_like_the_files_rotated_by_neighbours():
    draw = np.random.default_rng(1)
    heads, width, depth = 2, 8, 5
    q_file, k_file = draw.normal(size=(2, heads * width, depth))
    x, y = draw.normal(size=(2, depth))
    angles = draw.normal(size=width // 2)

    def turned(vector, first, second):
        result = vector.copy()
        result[:, first] = vector[:, first] * np.cos(angles) - vector[:, second] * np.sin(angles)
        result[:, second] = vector[:, second] * np.cos(angles) + vector[:, first] * np.sin(angles)
        return result

    def scores(q, k, first, second):
        query, key = (q @ x).reshape(heads, width), (k @ y).reshape(heads, width)
        return (turned(query, first, second) * key).sum(-1)

    neighbours = scores(q_file, k_file, slice(0, None, 2), slice(1, None, 2))
    q, k = gguf.unpermute(q_file, heads), gguf.unpermute(k_file, heads)
    halves = scores(q, k, slice(0, width // 2), slice(width // 2, None))
    np.testing.assert_allclose(halves, neighbours, rtol=1e-12)
    assert not np.allclose(scores(q_file, k_file, slice(0, width // 2), slice(width // 2, None)), neighbours)


def test_the_quantisation_is_that_of_most_numbers(tmp_path):
    def mixed(writer):
        for name, rows, kind in (("a", 64, "Q4_1"), ("b", 8, "Q8_0")):
            storage = package.GGMLQuantizationType[kind]
            writer.add_tensor(
                name, package.quants.quantize(np.ones((rows, 32), np.float32), storage), raw_dtype=storage
            )

    assert gguf.quantization(gguf.read_gguf(write_bare_gguf(tmp_path / "a.gguf", mixed))) == "Q4_1"


def test_a_storage_type_that_cannot_be_dequantised_is_named(tmp_path):
    def integers(writer):
        writer.add_tensor("output.weight", np.zeros((10, 32), np.int8))

    path = write_bare_gguf(tmp_path / "a.gguf", integers)
    file = gguf.read_gguf(path)
    with pytest.raises(UserError, match=r"a.gguf: output.weight is stored as I8, which cannot be dequantised"):
        gguf.read_tensor(file, "output.weight", gguf.read_config(file))


# ---- damage ---------------------------------------------------------------------------------------------------------


def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    for length in [*range(4, 400, 7), *range(400, len(content), len(content) // 60), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError) as caught:
            gguf.read_gguf(path)
        assert f"{path} is truncated or damaged at {length:,} bytes" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_damaged_metadata_never_shows_the_readers_own_errors(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        damaged = bytearray(content)
        damaged[draw.randrange(4, 2000)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            gguf.read_config(gguf.read_gguf(path))
        except UserError as error:
            assert str(path) in str(error)  # a damage that hits a string's letters goes unseen


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 a zip", struct.pack("<I", 0)])
def test_a_file_of_another_kind(tmp_path, content):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.gguf is not a GGUF file"):
        gguf.read_gguf(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"absent.gguf could not be read"):
        gguf.read_gguf(tmp_path / "absent.gguf")


def test_a_file_is_parsed_once_and_again_when_it_changes(tmp_path):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    first = gguf.read_gguf(path)
    assert gguf.read_gguf(str(path)) is first
    stat = path.stat()
    path.write_bytes(path.read_bytes().replace(b"<|im_end|>", b"<|im_END|>"))  # as long as before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert "<|im_END|>" in gguf.read_gguf(path).metadata["tokenizer.ggml.tokens"]
    write_bare_gguf(tmp_path / "other.gguf", lambda writer: None).replace(path)
    assert len(gguf.read_gguf(path).tensors) == 1
