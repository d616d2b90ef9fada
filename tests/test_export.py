"""ragjax.export: what a run trained comes out, what it did not train comes out as it came in, and nothing half-done."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from ragjax.errors import UserError
from ragjax.exporting import export_run
from ragjax.models.lora import LoraConfig
from ragjax.pretrained import load_embedder, load_generator
from ragjax.runs import ask, open_run
from ragjax.training import train
from ragjax.weights import load_tokenizer, read_embedder_settings, resolve_model
from tests.tiny import write_tiny_bert, write_tiny_gguf, write_tiny_llama, write_tiny_mpnet
from tests.tiny_exports import nudged, random_adapters, write_run
from tests.tiny_folders import LAYOUTS, edit, pool
from tests.tiny_runs import questions, tiny_world
from tests.unicode_lines import unicode_lines

TARGETS = ("q_proj", "v_proj", "up_proj")
LORA = LoraConfig(rank=4, alpha=6.0, targets=TARGETS)
TOKENS = np.arange(40).reshape(2, 20) * 7 % 300


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(scope="module")
def embedder(world):
    """The untrained one."""
    return load_embedder(world.embedder)


@pytest.fixture(scope="module")
def generator(world):
    """The untrained one, in a form that carries adapters."""
    return load_generator(world.generator, lora=LORA)


@pytest.fixture(scope="module")
def lora(generator):
    return random_adapters(generator.params, 4, TARGETS)


def config_of(world, run_dir, **changes):
    return world.config(run_dir, lora_alpha=6.0, lora_targets=",".join(TARGETS), **changes)


@pytest.fixture(scope="module")
def joint(world, embedder, lora):
    """A finished joint run with adapters, and its export with --merge."""
    folder = world.folder / "export-joint"
    trained = {"joint": {"embedder": {"params": nudged(embedder.params)}, "generator": {"lora": lora}}}
    write_run(folder, config_of(world, folder), trained)
    return folder, export_run(folder, world.folder / "exported-joint", merge=True)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        export_run(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- what comes out ----------------------------------------------------------------------------------------


def test_the_folders_hold_what_their_libraries_look_for(joint, world):
    exported = files_of(joint[1])
    assert set(exported) == {
        *(f"embedder/{name}" for name in files_of(world.embedder)),
        "embedder/config_sentence_transformers.json",
        "embedder/README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/README.md",
        *(f"generator/{name}" for name in files_of(world.generator)),
        "generator/README.md",
    }
    weights = {"embedder/model.safetensors", "generator/model.safetensors"}
    for role, source in (("embedder", world.embedder), ("generator", world.generator)):
        for name, content in files_of(source).items():
            assert (exported[f"{role}/{name}"] == content) == (f"{role}/{name}" not in weights), name


def test_the_embedder_gives_the_trained_vectors(joint, world, embedder):
    texts = ["Which number has the town Arby?", "The river runs past the old town.", ""]
    exported = load_embedder(joint[1] / "embedder")
    trained = dataclasses.replace(embedder, params=nudged(embedder.params))
    np.testing.assert_array_equal(exported.encode(texts), trained.encode(texts))
    assert np.abs(exported.encode(texts) - embedder.encode(texts)).max() > 1e-3
    saved, source = (load_file(folder / "model.safetensors") for folder in (joint[1] / "embedder", world.embedder))
    for name in ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"):
        assert saved[name].tobytes() == source[name].tobytes()


def test_merged_logits_equal_those_with_adapters(joint, generator, lora):
    exported = load_generator(joint[1] / "generator")
    adapted = np.asarray(dataclasses.replace(generator, lora=lora).logits(TOKENS))
    np.testing.assert_allclose(exported.logits(TOKENS), adapted, rtol=0, atol=1e-5 * np.abs(adapted).max())
    base = load_generator(exported.source.path.parent.parent / "llama")
    assert np.abs(np.asarray(base.logits(TOKENS)) - adapted).max() > 1e-2


def test_only_the_adapted_matrices_differ_from_the_source(joint, world):
    saved, source = (load_file(folder / "model.safetensors") for folder in (joint[1] / "generator", world.generator))
    assert saved.keys() == source.keys()
    for name in source:
        same = saved[name].tobytes() == source[name].tobytes()
        assert same == (name.split(".")[-2] not in TARGETS), name


def test_the_adapter_says_how_it_is_applied(joint, world, lora):
    config = json.loads((joint[1] / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(world.generator)
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 4, 6)
    assert config["target_modules"] == list(TARGETS)
    saved = load_file(joint[1] / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * len(TARGETS)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    np.testing.assert_array_equal(saved[name], lora["layers"]["mlp"]["up_proj"]["lora_b"][1].T)


def test_the_exported_pipeline_answers_as_the_run_does(joint, world):
    folder, out = joint
    opened = open_run(folder)
    trained = opened.pipeline
    reader = dataclasses.replace(trained.reader, generator=load_generator(out / "generator"))
    bare = dataclasses.replace(trained, embedder=load_embedder(out / "embedder"), reader=reader)
    moved = dataclasses.replace(opened, pipeline=bare)
    for question in questions()["test"][:2]:
        ours, theirs = (
            ask(which.pipeline, question["question"], dataclasses.replace(which.config, top_k=2))
            for which in (opened, moved)
        )
        assert ours.text == theirs.text
        assert ours.probability == pytest.approx(theirs.probability, rel=1e-3)
        assert [passage.id for passage in ours.passages] == [passage.id for passage in theirs.passages]


def test_each_folder_has_a_card(joint, world):
    for role, library in (("embedder", "SentenceTransformer("), ("adapter", "PeftModel"), ("generator", "AutoModel")):
        text = (joint[1] / role / "README.md").read_text(encoding="utf-8")
        source = resolve_model(world.embedder if role == "embedder" else world.generator)
        for words in (
            source.weights_sha256,
            "Strategy: joint",
            "objective: rag_token",
            "Data: data",
            "see the base model",
        ):
            assert words in text, (role, words)
        assert library in text
        assert re.search(r"^em +0\.250 +0\.750 +\+0\.500", text, re.MULTILINE)
        assert "step 7 of the phase joint" in text
        assert "not finished" not in text


def test_without_merging_the_base_is_left_out(joint, tmp_path):
    out = export_run(joint[0], tmp_path / "deep" / "out")
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "embedder"]
    assert files_of(out / "adapter") == files_of(joint[1] / "adapter")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_small_shards_load_again(joint, tmp_path, lora):
    out = export_run(joint[0], tmp_path / "out", merge=True, max_shard_bytes=20_000)
    for role in ("embedder", "generator"):
        assert len(list((out / role).glob("model-*.safetensors"))) > 2
        whole, parts = load_file(joint[1] / role / "model.safetensors"), {}
        for file in resolve_model(out / role).files:
            parts |= load_file(file)
        assert {name: value.tobytes() for name, value in parts.items()} == {
            name: value.tobytes() for name, value in whole.items()
        }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_that_was_not_trained_is_its_source(world, tmp_path, lora, dtype):
    source = write_tiny_bert(tmp_path / "bert", torch_dtype=dtype)
    for name in ("pytorch_model.bin", "code.py", "pytorch_model.bin.index.json", "NOTICE"):
        (source / name).write_text(name)
    config = config_of(world, tmp_path / "run", strategy="generator", embedder=str(source))
    write_run(tmp_path / "run", config, {"generator": {"generator": {"lora": lora}}})
    out = export_run(tmp_path / "run", tmp_path / "out")
    exported = files_of(out / "embedder")
    assert b"did not train it" in exported.pop("README.md")
    exported.pop("config_sentence_transformers.json")
    wanted = files_of(source)
    assert exported == {
        name: wanted[name]
        for name in wanted
        if name not in ("pytorch_model.bin", "code.py", "pytorch_model.bin.index.json")
    }


def test_a_generator_that_was_not_trained_is_its_source_shards_and_all(world, tmp_path, embedder):
    source = write_tiny_llama(tmp_path / "llama", torch_dtype="bfloat16")
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    names = load_file(source / "model-00001-of-00001.safetensors")
    places = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = config_of(world, tmp_path / "run", generator=str(source))
    write_run(tmp_path / "run", config, {"embedder": {"embedder": {"params": nudged(embedder.params)}}})
    out = export_run(tmp_path / "run", tmp_path / "out")
    exported = files_of(out / "generator")
    assert b"did not train it" in exported.pop("README.md")
    assert exported == files_of(source)
    assert not (out / "adapter").exists()
    assert (
        load_file(out / "embedder" / "model.safetensors").keys()
        == load_file(world.embedder / "model.safetensors").keys()
    )


def test_a_run_that_trained_nothing_gives_both_sources(world, tmp_path):
    write_run(tmp_path / "run", config_of(world, tmp_path / "run", strategy="none"), {})
    out = export_run(tmp_path / "run", tmp_path / "out")
    for role, source in (("embedder", world.embedder), ("generator", world.generator)):
        assert (out / role / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
        assert "nothing was trained" in (out / role / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_generator_trained_as_a_whole(world, tmp_path, dtype):
    source = write_tiny_llama(tmp_path / "llama", torch_dtype=dtype, tie_word_embeddings=False)
    base = load_generator(source)
    params = nudged(base.params)
    config = config_of(world, tmp_path / "run", strategy="generator", generator=str(source), lora_rank=0)
    write_run(tmp_path / "run", config, {"generator": {"generator": {"params": params}}})
    out = export_run(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["embedder", "generator"]
    exported = load_generator(out / "generator").params
    for path in (("lm_head", "kernel"), ("layers", "self_attn", "o_proj", "kernel"), ("norm", "scale")):
        ours, theirs = exported, params
        for name in path:
            ours, theirs = ours[name], theirs[name]
        stored = theirs.astype("bfloat16" if dtype == "bfloat16" else "float32").astype(np.float32)
        np.testing.assert_array_equal(ours, stored)
    assert load_file(out / "generator" / "model.safetensors")["lm_head.weight"].dtype == np.dtype(dtype)


@pytest.mark.parametrize("merge", [True, False])
def test_mpnet_and_a_mistral_that_was_quantised_in_training(world, tmp_path, merge):
    """The adapters are added to what the source holds, not to what its 4 bits stand for."""
    embedder = load_embedder(write_tiny_mpnet(tmp_path / "mpnet"))
    fields = {"model_type": "mistral", "sliding_window": 5}
    generator = load_generator(write_tiny_llama(tmp_path / "mistral", seed=4, **fields), lora=LORA)
    lora = random_adapters(generator.params, 4, TARGETS)
    config = config_of(
        world, tmp_path / "run", embedder=str(tmp_path / "mpnet"), generator=str(tmp_path / "mistral"), quantize="nf4"
    )
    trained = {"embedder": {"params": nudged(embedder.params)}, "generator": {"lora": lora}}
    write_run(tmp_path / "run", config, {"joint": trained})
    out = export_run(tmp_path / "run", tmp_path / "out", merge=merge)
    texts = ["Which number has the town Arby?", ""]
    expected = dataclasses.replace(embedder, params=nudged(embedder.params)).encode(texts)
    np.testing.assert_array_equal(load_embedder(out / "embedder").encode(texts), expected)
    assert (out / "generator").exists() == merge
    if merge:
        adapted = np.asarray(dataclasses.replace(generator, lora=lora).logits(TOKENS))
        exported = load_generator(out / "generator")
        np.testing.assert_allclose(exported.logits(TOKENS), adapted, rtol=0, atol=1e-5 * np.abs(adapted).max())
        assert exported.config.sliding_window == 5


def test_the_last_phase_that_trained_a_model_counts(world, tmp_path, embedder, generator, lora):
    """Two phases that trained one model each: both are exported."""
    config = config_of(world, tmp_path / "run")
    phases = {"first": {"generator": {"lora": lora}}, "second": {"embedder": {"params": nudged(embedder.params)}}}
    write_run(tmp_path / "run", config, phases)
    out = export_run(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "embedder"]
    trained = load_file(out / "embedder" / "model.safetensors")
    assert trained["embeddings.word_embeddings.weight"].tobytes() != (
        load_file(world.embedder / "model.safetensors")["embeddings.word_embeddings.weight"].tobytes()
    )
    assert "step 7 of the phase second" in (out / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_a_run_as_training_leaves_it(world, tmp_path):
    train(world.config(tmp_path / "run", max_steps=2, eval_limit=1))
    out = export_run(tmp_path / "run", tmp_path / "out", merge=True)
    opened = open_run(tmp_path / "run")
    trained = opened.pipeline.generator.logits(TOKENS)
    np.testing.assert_allclose(load_generator(out / "generator").logits(TOKENS), trained, rtol=0, atol=1e-4)
    vectors = opened.pipeline.embedder.encode(["a town"])
    np.testing.assert_array_equal(load_embedder(out / "embedder").encode(["a town"]), vectors)


# ---- sources of other kinds --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def from_gguf(world, tmp_path_factory):
    """A run over a quantised GGUF file with an untied head, its export, its adapters and its model."""
    folder = tmp_path_factory.mktemp("gguf")
    source = write_tiny_gguf(folder / "tiny.gguf", kind="Q8_0", tie_word_embeddings=False)
    generator = load_generator(source, lora=LoraConfig(rank=4, alpha=6.0, targets=TARGETS))
    lora = random_adapters(generator.params, 4, TARGETS)
    config = config_of(world, folder / "run", strategy="generator", generator=str(source))
    write_run(folder / "run", config, {"generator": {"generator": {"lora": lora}}})
    return source, export_run(folder / "run", folder / "out", merge=True), dataclasses.replace(generator, lora=lora)


def test_gguf_comes_out_as_a_float32_folder(from_gguf):
    source, out, trained = from_gguf
    saved = load_file(out / "generator" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {np.dtype(np.float32)}
    exported = load_generator(out / "generator")
    logits = np.asarray(trained.logits(TOKENS))
    np.testing.assert_allclose(exported.logits(TOKENS), logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    assert (exported.eos_token_id, exported.end_ids) == (trained.eos_token_id, trained.end_ids)
    config = json.loads((out / "generator" / "config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"]) == ("llama", False)
    assert "end_token_ids" not in config
    assert json.loads((out / "generator" / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "stored as Q8_0" in (out / "adapter" / "README.md").read_text()


def test_gguf_tokenizer_gives_the_same_ids(from_gguf):
    source, out, _ = from_gguf
    ours, exported = load_tokenizer(resolve_model(source)), load_tokenizer(resolve_model(out / "generator"))
    plain = Tokenizer.from_file(str(out / "generator" / "tokenizer.json"))
    lines = ["in 1994 and 12 x 345", " 7", "a\n\n1", *unicode_lines(200, seed=5)]
    for line in lines:
        ids = ours(line)["input_ids"]
        assert exported(line)["input_ids"] == ids, repr(line)
        if "<|" not in line:  # the bare library takes special tokens' strings for special tokens
            assert plain.encode(line).ids == ids, repr(line)
        assert exported.decode(ids) == ours.decode(ids)
    assert [len(plain.encode(number).ids) for number in ("1", "12", "123")] == [1, 2, 3]
    assert exported.chat_template == ours.chat_template
    assert exported.special_tokens_map == ours.special_tokens_map


@pytest.mark.parametrize("name", ["notes.txt", "modules.json", "1_Pooling"])
def test_a_link_out_of_a_models_folder_is_not_followed(world, tmp_path, name):
    """A folder from the net could hold one to a private file, which the export would then publish."""
    source, elsewhere = tmp_path / "bert", tmp_path / "private"
    write_tiny_bert(source)
    elsewhere.mkdir()
    if (source / name).exists():
        (source / name).rename(elsewhere / name)
    else:
        (elsewhere / name).write_text("a secret")
    (source / name).symlink_to(f"../private/{name}")
    write_run(tmp_path / "run", config_of(world, tmp_path / "run", strategy="none", embedder=str(source)), {})
    message = refusal(tmp_path / "run", tmp_path / "out")
    assert str(source / name) in message and "is a symbolic link out of its model's folder" in message
    assert not (tmp_path / "out").exists()


def test_links_inside_a_models_folder_and_into_the_hubs_blobs_are_followed(world, tmp_path):
    """The hub's cache keeps files by their hash beside the folders, which hold nothing but links to them."""
    plain = write_tiny_bert(tmp_path / "bert")
    cached = tmp_path / "models--owner--bert" / "snapshots" / "abc"
    blobs = cached.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in plain.rglob("*") if path.is_file())):
        shutil.copy(path, blobs / str(number))
        link = cached / path.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        depth = len(link.relative_to(cached).parts) + 1
        link.symlink_to("/".join([".."] * depth + ["blobs", str(number)]))
    shutil.copytree(plain, tmp_path / "linked")
    (tmp_path / "linked" / "config.json").rename(tmp_path / "linked" / "settings")
    (tmp_path / "linked" / "config.json").symlink_to("settings")
    found = []
    for source in (plain, cached, tmp_path / "linked"):
        run = tmp_path / f"run-{source.name}"
        write_run(run, config_of(world, run, strategy="none", embedder=str(source)), {})
        files = files_of(export_run(run, tmp_path / f"out-{source.name}") / "embedder")
        del files["README.md"]  # names the source
        found.append(files)
    assert "1_Pooling/config.json" in found[0] and "model.safetensors" in found[0]
    assert found[0] == found[1] == found[2]


def test_a_plain_encoder_becomes_a_sentence_encoder(world, tmp_path):
    source = write_tiny_bert(tmp_path / "bert")
    shutil.rmtree(source / "1_Pooling")
    for name in ("modules.json", "sentence_bert_config.json"):
        (source / name).unlink()
    write_run(tmp_path / "run", config_of(world, tmp_path / "run", strategy="none", embedder=str(source)), {})
    folder = export_run(tmp_path / "run", tmp_path / "out") / "embedder"
    modules = json.loads((folder / "modules.json").read_text())
    assert [module["type"].rpartition(".")[2] for module in modules] == ["Transformer", "Pooling", "Normalize"]
    pooling = json.loads((folder / modules[1]["path"] / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] is True
    assert pooling["word_embedding_dimension"] == 32
    assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 512
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == {"query": "", "document": ""}
    assert (settings["default_prompt_name"], settings["similarity_fn_name"]) == (None, "cosine")


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ({}, {"query": "who: ", "document": "town: ", "passage": "town: ", "other": "x"}),
        (
            {"query_prefix": "", "passage_prefix": "in "},
            {"query": "", "document": "in ", "passage": "in ", "other": "x"},
        ),
    ],
)
def test_prefixes_are_exported_as_they_were_used(world, tmp_path, given, prompts):
    source = write_tiny_bert(tmp_path / "bert")
    pool(source, "cls")
    own = {"query": "who: ", "passage": "town: ", "other": "x"}
    edit(
        source / "config_sentence_transformers.json",
        prompts=own,
        default_prompt_name="passage",
        similarity_fn_name="dot",
    )
    config = config_of(world, tmp_path / "run", strategy="none", embedder=str(source), **given)
    write_run(tmp_path / "run", config, {})
    folder = export_run(tmp_path / "run", tmp_path / "out") / "embedder"
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert settings == {"prompts": prompts, "default_prompt_name": "passage", "similarity_fn_name": "dot"}
    exported, used = load_embedder(folder), load_embedder(source, **given)
    assert (exported.prefixes, exported.config.pooling) == (used.prefixes, "cls")
    assert "cls pooling" in (folder / "README.md").read_text()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_comes_out_as_it_was_read(world, tmp_path, layout):
    layout(write_tiny_bert(tmp_path / "bert"))
    config = config_of(world, tmp_path / "run", strategy="none", embedder=str(tmp_path / "bert"))
    write_run(tmp_path / "run", config, {})
    folder = export_run(tmp_path / "run", tmp_path / "out") / "embedder"
    before, after = (read_embedder_settings(resolve_model(path), 512) for path in (tmp_path / "bert", folder))
    assert after.remarks == ()
    assert after.modules == ("Transformer", "Pooling", "Normalize")
    for name in ("max_seq_length", "truncation_side", "lower_case", "pooling", "prefixes"):
        assert getattr(after, name) == getattr(before, name), name


def test_vectors_get_their_unit_length_also_where_the_source_had_none(world, tmp_path):
    source = write_tiny_bert(tmp_path / "bert")
    modules = json.loads((source / "modules.json").read_text())[:2]
    (source / "modules.json").write_text(json.dumps(modules))
    write_run(tmp_path / "run", config_of(world, tmp_path / "run", strategy="none", embedder=str(source)), {})
    folder = export_run(tmp_path / "run", tmp_path / "out") / "embedder"
    modules = json.loads((folder / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
    assert (folder / "1_Pooling" / "config.json").is_file()


# ---- what is refused ---------------------------------------------------------------------------------------


def test_an_unfinished_run_is_exported_and_says_so(world, tmp_path, lora, capsys):
    config = config_of(world, tmp_path / "run")
    write_run(tmp_path / "run", config, {"first": {"generator": {"lora": lora}}, "second": {}}, finished=False)
    out = export_run(tmp_path / "run", tmp_path / "out")
    words = "not finished: its last checkpoint, step 7 of the phase first"
    assert words in capsys.readouterr().out
    text = (out / "adapter" / "README.md").read_text()
    assert words in text
    assert "Scores" not in text
    assert not (tmp_path / "run" / "checkpoints" / "second").exists()


def test_a_run_without_a_checkpoint_is_refused(world, tmp_path):
    write_run(tmp_path / "run", config_of(world, tmp_path / "run"), {"joint": {}}, finished=False)
    assert "holds no checkpoint: run ragjax.train" in refusal(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_no_run_is_refused(world, tmp_path):
    assert "nowhere holds no config.json: give --run_dir" in refusal(tmp_path / "nowhere", tmp_path / "out")
    message = refusal(world.generator, tmp_path / "out")
    assert "config.json does not describe a run" in message
    assert "--run_dir" in message
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_kept(joint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "out exists already: choose another folder for --out" in refusal(joint[0], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "mine"]
    assert "--out is empty" in refusal(joint[0], " ")


def test_a_full_disk_is_told_before_anything_is_written(joint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=100_000))
    assert "bytes, and 100,000 are free: free some space" in refusal(joint[0], tmp_path / "out", merge=True)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_nothing(joint, tmp_path, monkeypatch):
    import ragjax.weights.save as save

    merge, calls = save._merge, []

    def fail_later(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return merge(*arguments)

    monkeypatch.setattr(save, "_merge", fail_later)
    assert "No space left on device" in refusal(joint[0], tmp_path / "out", merge=True)
    assert len(calls) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_changed_since_is_refused(world, tmp_path, lora):
    source = write_tiny_llama(tmp_path / "llama")
    write_run(
        tmp_path / "run",
        config_of(world, tmp_path / "run", generator=str(source)),
        {"joint": {"generator": {"lora": lora}}},
    )
    write_tiny_llama(source, seed=9)
    assert "was made with a different --generator" in refusal(tmp_path / "run", tmp_path / "out")
    shutil.rmtree(source)
    assert "llama" in refusal(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command(joint, world, tmp_path):
    done = world.command("-m", "ragjax.export", f"--run_dir={joint[0]}", f"--out={tmp_path / 'out'}", "--merge")
    assert done.returncode == 0, done.stderr[-2000:]
    for role in ("embedder", "adapter", "generator"):
        assert f"{tmp_path / 'out' / role}: " in done.stdout
        assert files_of(tmp_path / "out" / role) == files_of(joint[1] / role)
    again = world.command("-m", "ragjax.export", f"--run_dir={joint[0]}", f"--out={tmp_path / 'out'}")
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert len(again.stderr.strip().splitlines()) == 1
