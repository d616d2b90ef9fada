"""ragjax.weights.sentence_folder: what is read from where, in every layout, and what is refused by name."""

import dataclasses
import json

import pytest

from ragjax.errors import UserError
from ragjax.weights import Prefixes, read_embedder_settings, resolve_model
from ragjax.weights.resolve import KNOWN_MODELS
from tests import tiny_folders as layouts
from tests.tiny import write_tiny_bert
from tests.tiny_folders import edit, pool

BGE = "Represent this sentence for searching relevant passages: "


@pytest.fixture
def folder(tmp_path):
    return write_tiny_bert(tmp_path)


def read(folder, **prefixes):
    return read_embedder_settings(resolve_model(folder), longest=512, **prefixes)


def refusal(folder, **prefixes) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, **prefixes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the longest text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "tokenizer", "expected"),
    [
        (64, 512, 64),
        (64, 32, 64),  # the encoder's own goes first
        (4096, 512, 512),  # as many positions as the model has
        (None, 32, 32),
        (..., 32, 32),  # versions from 5.4 on write it there alone
        (..., 1000000000000000019884624838656, 512),  # how transformers writes "no limit"
        (..., 1e30, 512),
        (..., None, 512),
        (..., ..., 512),
    ],
)
def test_the_longest_text(folder, encoder, tokenizer, expected):
    edit(folder / "sentence_bert_config.json", max_seq_length=encoder)
    edit(folder / "tokenizer_config.json", model_max_length=tokenizer)
    assert read(folder).max_seq_length == expected


def test_an_older_name_of_the_tokenizers_length(folder):
    edit(folder / "sentence_bert_config.json", max_seq_length=None)
    edit(folder / "tokenizer_config.json", model_max_length=..., max_len=40)
    assert read(folder).max_seq_length == 40
    edit(folder / "tokenizer_config.json", model_max_length=32)
    assert read(folder).max_seq_length == 32


@pytest.mark.parametrize("value", [0, 2, -1, "64", True, float("nan")])
def test_a_longest_text_that_is_none(folder, value):
    edit(folder / "sentence_bert_config.json", max_seq_length=value)
    assert "sentence_bert_config.json has max_seq_length = " in refusal(folder)
    edit(folder / "sentence_bert_config.json", max_seq_length=None)
    edit(folder / "tokenizer_config.json", model_max_length=value)
    assert "tokenizer_config.json has model_max_length = " in refusal(folder)


def test_the_encoders_file_has_many_names(folder):
    (folder / "sentence_bert_config.json").rename(folder / "sentence_roberta_config.json")
    edit(folder / "sentence_roberta_config.json", max_seq_length=40, do_lower_case=True)
    assert (read(folder).max_seq_length, read(folder).lower_case) == (40, True)


# ---- modules and pooling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_each_spelling_of_the_pooling(folder, mode):
    path = folder / "1_Pooling" / "config.json"
    pool(folder, mode)
    assert read(folder).pooling == mode
    for spelled in (mode, [mode]):
        path.write_text(json.dumps({"embedding_dimension": 32, "pooling_mode": spelled, "include_prompt": True}))
        assert read(folder).pooling == mode
    edit(path, pooling_mode_lasttoken=True)  # the newer spelling decides where both are there
    assert read(folder).pooling == mode
    layouts.as_newest(folder, mode)
    settings = read(folder)
    assert (settings.pooling, settings.max_seq_length, settings.remarks) == (mode, 24, ())
    assert settings.modules == ("Transformer", "Pooling", "Normalize")


def test_no_pooling_named_is_the_mean(folder):
    (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 32}')
    assert read(folder).pooling == "mean"


def test_a_plain_encoder_takes_the_mean_and_says_so(folder):
    layouts.make_plain(folder)
    settings = read(folder)
    assert (settings.pooling, settings.max_seq_length, settings.modules) == ("mean", 512, ())
    (remark,) = settings.remarks
    assert "creating a new sentence encoder with mean pooling" in remark


@pytest.mark.parametrize(
    "left", ["1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json"]
)
def test_a_part_of_a_folder_is_no_plain_encoder(folder, left):
    layouts.make_plain(folder)
    edit(folder / left, max_seq_length=64)
    assert f"has {left} but no modules.json" in refusal(folder)


@pytest.mark.parametrize(
    ("similarity", "normalised", "words"),
    [
        ("cosine", True, ""),
        (None, True, ""),
        ("dot", True, ""),
        ("cosine", False, "no unit length; here vectors are scaled to unit length and ranked by cosine"),
        ("dot", False, "the similarity 'dot'; here vectors are scaled to unit length and ranked by cosine"),
        ("manhattan", True, "the similarity 'manhattan'"),
    ],
)
def test_what_is_ranked_otherwise_is_said(folder, similarity, normalised, words):
    edit(folder / "config_sentence_transformers.json", similarity_fn_name=similarity)
    if not normalised:
        layouts.drop_modules(folder, "Normalize")
    remarks = read(folder).remarks
    assert len(remarks) == bool(words)
    assert words in "".join(remarks)


@pytest.mark.parametrize(
    ("kind", "path", "words"),
    [
        ("sentence_transformers.models.Dense", "2_Dense", "Dense', but only sentence-transformers' own Transf"),
        ("sentence_transformers.models.LayerNorm", "2_LayerNorm", "LayerNorm"),
        ("custom_st.Transformer", "2_Custom", "asks for a module 'custom_st.Transformer'"),
        ("sentence_transformers.models.Pooling", "3_Pooling", "modules Transformer, Pooling, Pooling, Normalize"),
        ("sentence_transformers.models.Normalize", "../2_Normalize", "has the path '../2_Normalize'"),
    ],
)
def test_modules_that_are_refused(folder, kind, path, words):
    layouts.add_module(folder, kind, path)
    assert words in refusal(folder)


def test_modules_in_another_order_or_place(folder):
    path = folder / "modules.json"
    modules = json.loads(path.read_text())
    path.write_text(json.dumps(modules[::-1]))
    assert "the modules Normalize, Pooling, Transformer" in refusal(folder)
    path.write_text(json.dumps(modules[:1]))
    assert "the modules Transformer, but only" in refusal(folder)
    path.write_text(json.dumps([modules[0] | {"path": "0_Transformer"}, *modules[1:]]))
    assert "keeps the encoder in the folder '0_Transformer', as versions before 2 did" in refusal(folder)
    path.write_text('{"0": "Transformer"}')
    assert "modules.json is no list of modules" in refusal(folder)
    path.write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").unlink()
    assert "1_Pooling/config.json is missing" in refusal(folder)


# ---- prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "default", "expected"),
    [
        ({"query": "q: ", "document": "d: "}, None, Prefixes("q: ", "d: ", "")),
        ({"query": "q: ", "passage": "p: "}, "query", Prefixes("q: ", "p: ", "q: ")),
        ({"query": "q: ", "corpus": "c: "}, "corpus", Prefixes("q: ", "c: ", "c: ")),
        ({"query": "q: ", "passage": ""}, None, Prefixes("q: ", "", "")),
        ({"query": None, "document": None}, "document", Prefixes("", "", "")),
        ({}, "query", Prefixes("", "", "")),
    ],
)
def test_which_prompt_goes_where(folder, prompts, default, expected):
    edit(folder / "config_sentence_transformers.json", prompts=prompts, default_prompt_name=default)
    assert read(folder).prefixes == expected
    assert read(folder).remarks == ()


def test_given_prefixes_go_first_and_empty_ones_count(folder):
    prompts = {"query": "q: ", "passage": "p: ", "other": "o: "}
    edit(folder / "config_sentence_transformers.json", prompts=prompts, default_prompt_name="passage")
    assert read(folder, query_prefix="Q ").prefixes == Prefixes("Q ", "p: ", "p: ")
    assert read(folder, query_prefix="", passage_prefix="P ").prefixes == Prefixes("", "P ", "P ")
    assert read(folder, passage_prefix="P ").prompts == {
        "query": "q: ", "document": "P ", "passage": "P ", "other": "o: "
    }  # fmt: skip


def test_a_default_prompt_that_neither_side_uses_is_said(folder):
    edit(folder / "config_sentence_transformers.json", prompts={"search": "s: "}, default_prompt_name="search")
    settings = read(folder)
    assert settings.prefixes == Prefixes("", "", "s: ")
    assert "the default prompt 'search'" in settings.remarks[0]
    assert read(folder, query_prefix="s: ").remarks == ()


def test_known_models_get_what_their_cards_say(folder):
    """BGE's and E5's repositories hold no prompts; what a folder does hold goes first."""
    source = resolve_model(folder)
    rules = {
        "minilm": Prefixes(), "mpnet": Prefixes(), "gte-base": Prefixes(), "multi-qa-mpnet": Prefixes(),
        "bge-small": Prefixes(BGE, ""), "bge-base": Prefixes(BGE, ""),
        "e5-small": Prefixes("query: ", "passage: "), "e5-base": Prefixes("query: ", "passage: "),
    }  # fmt: skip
    for known in KNOWN_MODELS:
        if known.short in rules:
            settings = read_embedder_settings(dataclasses.replace(source, known=known), 512)
            assert settings.prefixes == rules[known.short], known.short
    known = next(model for model in KNOWN_MODELS if model.short == "e5-base")
    own = dataclasses.replace(source, known=known)
    assert read_embedder_settings(own, 512, query_prefix="").prefixes == Prefixes("", "passage: ")
    edit(folder / "config_sentence_transformers.json", prompts={"query": "own: "})
    assert read_embedder_settings(own, 512).prefixes == Prefixes("own: ", "")


def test_pooling_without_the_prompt(folder):
    edit(folder / "1_Pooling" / "config.json", include_prompt=False)
    assert read(folder).prefixes == Prefixes()  # nothing is left out
    edit(folder / "config_sentence_transformers.json", prompts={"query": "q: "})
    assert "include_prompt = false" in refusal(folder)
    assert read(folder, query_prefix="").pooling == "mean"


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "asks for cls and mean pooling"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "asks for cls and mean pooling"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "asks for lasttoken pooling, but only one of mean"),
        ("1_Pooling/config.json", {"pooling_mode": []}, "asks for no pooling"),
        ("1_Pooling/config.json", {"pooling_mode_first": True}, "has 'pooling_mode_first', which this version"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": "no"}, "pooling_mode_cls_token = 'no'"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task = 'fill-mask'"),
        ("sentence_bert_config.json", {"query_length": 32}, "query_length = 32, but only None"),
        ("sentence_bert_config.json", {"model_args": {"num_hidden_layers": 1}}, "'num_hidden_layers': 1"),
        ("sentence_bert_config.json", {"something_new": 1}, "has 'something_new', which this version"),
        ("sentence_bert_config.json", {"do_lower_case": "yes"}, "do_lower_case = 'yes'"),
        ("tokenizer_config.json", {"truncation_side": "middle"}, "truncation_side = 'middle'"),
        ("config_sentence_transformers.json", {"truncate_dim": 16}, "truncate_dim = 16"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type = 'SparseEncoder'"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "maxsim"}, "similarity_fn_name = 'maxsim'"),
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "default_prompt_name = 'x'"),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": 1}},
            "has query = 1 in prompts where text is",
        ),
        ("config_sentence_transformers.json", {"prompts": ["query"]}, "prompts = ['query'] where an object is needed"),
        ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "module_input_name = 'token_embedd"),
    ],
)
def test_settings_that_are_refused(folder, file, change, words):
    edit(folder / file, **change)
    message = refusal(folder)
    assert words in message
    assert str(folder / file) in message


def test_settings_of_how_the_library_runs_a_model_change_nothing(folder):
    before = read(folder)
    runtime = {"trust_remote_code": True, "attn_implementation": "sdpa", "torch_dtype": "float16"}
    edit(folder / "sentence_bert_config.json", model_args=runtime, config_args={}, unpad_inputs=False)
    assert read(folder) == before
