"""ragjax.weights.gguf: settings, tensors and damage of GGUF files, on small ones in llama.cpp's layout."""

import math
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


def test_several_end_tokens(tmp_path):
    def ends(writer):
        writer.add_eos_token_id(7)
        writer.add_eot_token_id(3)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 5)

    path = write_bare_gguf(tmp_path / "a.gguf", ends)
    config = read_config(resolve_model(path))
    assert (config["eos_token_id"], config["end_token_ids"]) == ([7, 3, 5], [7, 3, 5])


def test_settings_that_say_nothing_are_let_through(tmp_path):
    def neutral(writer):
        writer.add_expert_count(0)
        writer.add_rope_scaling_type(package.RopeScalingType.NONE)
        writer.add_rope_scaling_attn_factors(1.0)
        writer.add_causal_attention(True)
        writer.add_string("llama.tensor_data_layout", "Meta AI original pth")

    assert gguf.read_config(gguf.read_gguf(write_bare_gguf(tmp_path / "a.gguf", neutral)))["hidden_size"] == 32


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda w: w.add_expert_count(8), "llama.expert_count = 8"),
        (lambda w: w.add_rope_scaling_type(package.RopeScalingType.LONGROPE), "llama.rope.scaling.type = longrope"),
        (lambda w: w.add_rope_scaling_attn_factors(0.5), "llama.rope.scaling.attn_factor = 0.5"),
        (lambda w: w.add_causal_attention(False), "llama.attention.causal = False"),
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
    message = refusal(write_bare_gguf(tmp_path / "a.gguf", lambda writer: None, architecture="phi3"))
    assert "architecture 'phi3'" in message


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


@pytest.mark.parametrize("kind", [{"model_type": "qwen2"}, {"model_type": "qwen3", "head_dim": 12}], ids=str)
def test_settings_of_a_qwen_are_those_of_the_folder(tmp_path, kind):
    config = read_config(resolve_model(write_tiny_gguf(tmp_path / "tiny.gguf", **kind)))
    name = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind["model_type"]]
    written = llama_config(llama_tokenizer()) | {"head_dim": 8, **kind, "architectures": [name]}
    changed = {key: value for key, value in config.items() if written.get(key, ...) != value}
    assert changed.pop("attention_bias", False) is (kind["model_type"] == "qwen2")  # which a Qwen2 does not read
    assert changed == {"pad_token_id": 2, "end_token_ids": [2]}


def scaled(path, **settings):
    """The rope_scaling of a bare file with these settings behind "llama.rope."."""

    def edit(writer):
        for key, value in settings.items():
            add = writer.add_string if isinstance(value, str) else writer.add_float32
            add(f"llama.rope.{key.replace('__', '.')}", value)

    return gguf.read_config(gguf.read_gguf(write_bare_gguf(path, edit)))["rope_scaling"]


def test_scaled_frequencies_are_read(tmp_path):
    path = tmp_path / "a.gguf"
    linear = {"rope_type": "linear", "factor": 4.0}
    assert scaled(path, scaling__type="linear", scaling__factor=4.0) == linear
    assert scaled(path, scaling__factor=4.0) == linear  # llama.cpp's default type
    assert scaled(path, scale_linear=4.0) == linear  # as older files have it
    assert scaled(path, scaling__type="linear", scaling__factor=1.0) is None
    assert scaled(path, scaling__type="none", scaling__factor=4.0) is None
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert scaled(path, scaling__type="yarn", scaling__factor=4.0) == yarn
    yarn["original_max_position_embeddings"] = 16
    assert scaled(path, scaling__type="yarn", scaling__factor=4.0, scaling__original_context_length=16.0) == yarn


def llama3_divisors(factor: float, theta: float = 5e5, width: int = 8) -> list[float]:
    """What llama.cpp's converter stores for Llama 3.1, wave by wave."""
    found = []
    for pair in range(width // 2):
        wave = 2 * math.pi * theta ** (2 * pair / width)
        share = (8192 / wave - 1) / (4 - 1)
        found.append(1.0 if wave < 8192 / 4 else factor if wave > 8192 else 1 / ((1 - share) / factor + share))
    return found


def with_frequencies(path, divisors, more=lambda writer: None):
    def edit(writer):
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
        more(writer)

    return write_bare_gguf(path, edit)


def test_llama_3s_frequencies_are_recognised(tmp_path):
    divisors = llama3_divisors(32.0)
    assert divisors[:2] == [1.0, 1.0]  # one is between, one is slowed in full
    assert 1 < divisors[2] < divisors[3] == 32
    file = gguf.read_gguf(
        with_frequencies(tmp_path / "a.gguf", divisors, lambda writer: writer.add_rope_freq_base(5e5))
    )
    assert gguf.read_config(file)["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert [entry.name for entry in gguf.stored_tensors(file)] == ["model.embed_tokens.weight"]


def test_frequencies_of_ones_change_nothing(tmp_path):
    file = gguf.read_gguf(with_frequencies(tmp_path / "a.gguf", [1.0] * 4))
    assert gguf.read_config(file)["rope_scaling"] is None


@pytest.mark.parametrize("divisors", [[2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 8.0], [0.5, 1.0, 1.0, 1.0]])
def test_other_frequencies_are_refused(tmp_path, divisors):
    message = refusal(with_frequencies(tmp_path / "a.gguf", divisors))
    assert "rope_freqs.weight divides its rotary frequencies by other numbers than Llama 3.1's" in message


def test_frequencies_that_are_scaled_twice_are_refused(tmp_path):
    def linear(writer):
        writer.add_rope_scaling_factor(2.0)
        writer.add_rope_freq_base(5e5)

    divisors = llama3_divisors(8.0)
    assert divisors[-1] == 8.0
    assert "twice" in refusal(with_frequencies(tmp_path / "a.gguf", divisors, linear))


# ---- files in parts -------------------------------------------------------------------------------------------------


def split_file(folder):
    write_tiny_gguf(folder / "tiny.gguf", seed=5, tensors_a_part=9)
    parts = sorted(folder.glob("*.gguf"))
    assert [part.name for part in parts] == [f"tiny-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    return parts


def test_a_split_file_is_the_whole_one_by_any_of_its_parts(tmp_path):
    whole = gguf.read_gguf(write_tiny_gguf(tmp_path / "whole.gguf", seed=5))
    (tmp_path / "parts").mkdir()
    parts = split_file(tmp_path / "parts")
    for part in parts:
        source = resolve_model(part)
        assert (source.path, source.files) == (parts[0], tuple(parts))
        file = gguf.read_gguf(source.path)
        assert gguf.read_config(file) == gguf.read_config(whole)
        assert file.tensors.keys() == whole.tensors.keys()
        config = gguf.read_config(file)
        for name in whole.tensors:
            values = gguf.read_tensor(file, name, config), gguf.read_tensor(whole, name, config)
            np.testing.assert_array_equal(*values)
    before = source.sha256
    parts[2].write_bytes(parts[2].read_bytes()[:-1] + b"!")
    assert resolve_model(parts[0]).sha256 != before


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_part_is_named(tmp_path, lost):
    parts = split_file(tmp_path)
    parts[lost].unlink()
    given = parts[(lost + 1) % 3]
    with pytest.raises(UserError) as caught:
        resolve_model(given)
    assert str(caught.value) == f"{parts[lost]} is missing, one of the 3 parts of {given.name}: download or copy it too"


def test_a_part_under_another_name_is_refused(tmp_path):
    parts = split_file(tmp_path)
    moved = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(UserError, match=r"model.gguf is part 1 of 3 by its own data.*NAME-00001-of-00003.gguf"):
        resolve_model(moved)
    moved.rename(parts[0])
    parts[1].rename(tmp_path / "x")
    parts[2].rename(parts[1])
    (tmp_path / "x").rename(parts[2])
    with pytest.raises(UserError, match="00002-of-00003.gguf is part 3 of 3"):
        resolve_model(parts[0])


# ---- tensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [{}, {"model_type": "qwen2"}, {"model_type": "qwen3", "head_dim": 12}, {"attention_bias": True, "mlp_bias": True}],
    ids=str,
)
def test_tensors_have_hugging_faces_names_shapes_and_values(tmp_path, kind):
    """Rows of q and k come back in Hugging Face's order from a LLaMA's file, and were never in another in a Qwen's."""
    file = gguf.read_gguf(write_tiny_gguf(tmp_path / "tiny.gguf", seed=5, **kind))
    config = gguf.read_config(file)
    weights = llama_weights(llama_config(llama_tokenizer()) | kind, seed=5)
    stored = {entry.name: entry for entry in gguf.stored_tensors(file)}
    assert stored.keys() == weights.keys()
    for name, entry in stored.items():
        assert entry.shape == weights[name].shape
        np.testing.assert_array_equal(gguf.read_tensor(file, entry.key, config), weights[name], err_msg=name)


def test_an_unknown_tensor_keeps_its_name(tmp_path):
    def extra(writer):
        writer.add_tensor("rope_factors_long.weight", np.ones(4, np.float32))

    file = gguf.read_gguf(write_bare_gguf(tmp_path / "a.gguf", extra))
    names = [entry.name for entry in gguf.stored_tensors(file)]
    assert names == ["model.embed_tokens.weight", "rope_factors_long.weight"]


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
