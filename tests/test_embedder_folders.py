"""Embedders as other people make them: every key that is followed moves a vector, and each side gets its own prefix."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from ragjax.errors import UserError
from ragjax.models.bert import BertConfig
from ragjax.models.encoders import POOLINGS, EncoderConfig
from ragjax.models.mpnet import MPNetConfig
from ragjax.pretrained import ENCODERS, load_embedder
from ragjax.weights import sentence_folder, wordpiece
from ragjax.weights.resolve import KNOWN_MODELS
from tests import tiny_folders as layouts
from tests.checkout import ROOT, in_checkout
from tests.tiny import write_tiny_bert
from tests.tiny_folders import edit, other_kinds

TEXTS = ["", "The River runs", "the café at the bridge 東京", "the author of the book " * 14]
PROMPTS = {"query": "who: ", "document": "book: "}
DOCUMENT = ROOT / "docs" / "models.md"

ENCODER, TOKENIZER, POOLING, NORMALIZE, PROMPT, CONFIG, MODULES = (
    "sentence_bert_config.json",
    "tokenizer_config.json",
    "1_Pooling/config.json",
    "2_Normalize/config.json",
    "config_sentence_transformers.json",
    "config.json",
    "modules.json",
)
# For each file and key that is claimed to be followed, another value than the folder below has.
FLIPS = {
    ENCODER: {
        "max_seq_length": 20,
        "do_lower_case": True,
        "transformer_task": "fill-mask",
        "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
        "module_output_name": "sentence_embedding",
        "query_length": 12,
        "document_length": 12,
        "query_expansion": {"strategy": "fixed", "length": 32},
        "tokenizer_name_or_path": "another/model",
        "processing_kwargs": {"text": {"max_length": 12}},
        "model_args": {"num_hidden_layers": 1},
        "model_kwargs": {"num_hidden_layers": 1},
        "tokenizer_args": {"do_lower_case": False},
        "processor_kwargs": {"do_lower_case": False},
        "config_args": {"hidden_act": "relu"},
        "config_kwargs": {"hidden_act": "relu"},
    },
    TOKENIZER: {
        "model_max_length": 24,
        "max_len": 24,
        "truncation_side": "left",
        "do_lower_case": True,
        "strip_accents": True,
        "tokenize_chinese_chars": False,
    },
    POOLING: dict.fromkeys(sentence_folder.POOLING_SWITCHES, True)
    | {"pooling_mode_mean_tokens": False, "pooling_mode": "max", "include_prompt": False},
    NORMALIZE: {"module_input_name": "token_embeddings", "module_output_name": "another"},
    PROMPT: {
        "prompts": {"query": "who: ", "document": "the author: "},
        "default_prompt_name": "query",
        "similarity_fn_name": "euclidean",
        "truncate_dim": 16,
        "model_type": "SparseEncoder",
    },
    CONFIG: {
        "model_type": "mpnet",
        "hidden_act": "relu",
        "position_embedding_type": "relative_key",
        "is_decoder": True,
        "add_cross_attention": True,
        "vocab_size": 301,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "layer_norm_eps": 0.1,
        "type_vocab_size": 1,
    },
}
CLAIMED = {
    ENCODER: sentence_folder.ENCODER_KEYS,
    TOKENIZER: (*sentence_folder.TOKENIZER_KEYS, *wordpiece.NORMALISATION),
    POOLING: sentence_folder.POOLING_KEYS,
    NORMALIZE: sentence_folder.NORMALIZE_KEYS,
    PROMPT: sentence_folder.PROMPT_KEYS,
    CONFIG: (
        *(name for name, _, _ in BertConfig.supported),
        *(field.name for field in dataclasses.fields(BertConfig) if field.name not in ("dtype", "pooling")),
    ),
}


def base(folder: Path) -> Path:
    """A folder where each key of FLIPS could move something: cased, with prompts, its length in the tokenizer's file.

    The pooling is named by its switches; without them, mean and CLS would both be "some change".
    """
    write_tiny_bert(folder)
    edit(folder / ENCODER, max_seq_length=None)
    edit(folder / TOKENIZER, model_max_length=48, do_lower_case=False)
    edit(folder / PROMPT, prompts=PROMPTS, default_prompt_name="document")
    edit(folder / POOLING, pooling_mode_cls_token=False, pooling_mode_mean_tokens=True)
    return folder


def vectors(folder: Path) -> np.ndarray:
    """Of every side, [3 * texts, E]."""
    embedder = load_embedder(folder)
    return np.concatenate(
        [each(TEXTS) for each in (embedder.encode, embedder.encode_queries, embedder.encode_passages)]
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return vectors(base(tmp_path_factory.mktemp("base")))


def test_every_key_that_is_claimed_is_tried():
    assert {file: set(keys) for file, keys in FLIPS.items()} == {file: set(keys) for file, keys in CLAIMED.items()}


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in FLIPS.items() for key in keys])
def test_a_key_is_followed_or_refused(tmp_path, capsys, expected, file, key):
    """Its other value changes the vectors, is refused in a sentence that names file and key, or is spoken of."""
    base(tmp_path)
    edit(tmp_path / file, **{key: FLIPS[file][key]})
    if file == POOLING and key == "pooling_mode_mean_tokens":
        edit(tmp_path / file, pooling_mode_max_tokens=True)  # with no switch on, the mean is meant
    if key == "max_len":
        edit(tmp_path / file, model_max_length=...)  # which goes before it
    try:
        found = vectors(tmp_path)
    except UserError as error:
        assert file.rsplit("/", 1)[-1] in str(error)
        return
    said = capsys.readouterr().err
    if key == "similarity_fn_name":
        assert "euclidean" in said and "cosine" in said
    else:
        assert np.abs(found - expected).max() > 1e-3
        assert said == ""


@pytest.mark.parametrize(
    ("file", "key", "wrong"),
    [(file, key, wrong) for file, keys in FLIPS.items() for key in keys for wrong in other_kinds(keys[key])],
)
def test_a_value_of_another_kind_is_refused_by_its_file(tmp_path, file, key, wrong):
    base(tmp_path)
    edit(tmp_path / file, **{key: wrong})
    if key == "max_len":
        edit(tmp_path / file, model_max_length=...)  # which goes before it
    with pytest.raises(UserError) as caught:
        load_embedder(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / file) in message and "\n" not in message
    assert key in message or key == "pooling_mode"  # "asks for 3 pooling"


@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=lambda each: each.__name__)
def test_what_the_layouts_say_is_said(tmp_path, capsys, layout):
    """Only a plain encoder and one without unit length give rise to a remark; all give finite unit vectors."""
    layout(write_tiny_bert(tmp_path))
    found = load_embedder(tmp_path).encode(TEXTS[:2])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    said = capsys.readouterr().err
    words = {
        "plain": "mean pooling",
        "plain_with_vocabulary": "mean pooling",
        "dot": "'dot'",
        "mxbai": "no unit length",
    }
    assert (words.get(layout.__name__, "") in said) and bool(said) == (layout.__name__ in words)


# ---- sides -------------------------------------------------------------------------------------------------


def test_each_side_gets_its_own_prefix(tmp_path):
    """The vectors are those of a model without prompts for texts that have the prefix in front already."""
    bare = load_embedder(write_tiny_bert(tmp_path / "bare"))
    folder = write_tiny_bert(tmp_path / "prompted")
    edit(folder / PROMPT, prompts=PROMPTS, default_prompt_name="document")
    embedder = load_embedder(folder)
    questions, passages = bare.encode([f"who: {t}" for t in TEXTS]), bare.encode([f"book: {t}" for t in TEXTS])
    np.testing.assert_array_equal(embedder.encode_queries(TEXTS), questions)
    np.testing.assert_array_equal(embedder.encode_passages(TEXTS), passages)
    np.testing.assert_array_equal(embedder.encode(TEXTS), passages)
    assert embedder.query_tokens(TEXTS) == bare.query_tokens([f"who: {text}" for text in TEXTS])
    assert embedder.passage_tokens(TEXTS) == bare.passage_tokens([f"book: {text}" for text in TEXTS])
    assert max(map(len, embedder.query_tokens(TEXTS))) == 64  # the prefix counts
    assert embedder.describe().endswith(", questions after 'who: ', passages after 'book: '")
    other = load_embedder(folder, query_prefix="", passage_prefix="town: ")
    np.testing.assert_array_equal(other.encode_queries(TEXTS), bare.encode(TEXTS))
    np.testing.assert_array_equal(other.encode_passages(TEXTS), bare.encode([f"town: {text}" for text in TEXTS]))


def test_stored_passages_depend_on_their_own_prefix_alone(tmp_path):
    folder = write_tiny_bert(tmp_path)
    one, question, passage = (
        load_embedder(folder, **given) for given in ({}, {"query_prefix": "q"}, {"passage_prefix": "p"})
    )
    assert one.passage_key == question.passage_key != passage.passage_key
    assert len({one.key, question.key, passage.key}) == 3


# ---- docs/models.md ----------------------------------------------------------------------------------------


def section() -> str:
    return DOCUMENT.read_text(encoding="utf-8").split("## Embedders")[1].split("\n## ")[0]


def row(first: str) -> str:
    """What the table's row says that begins with `first`."""
    (found,) = re.findall(rf"^\| {re.escape(first)} \|(.*)\|$", section(), re.MULTILINE)
    return found


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


@in_checkout
def test_the_document_names_what_is_supported():
    assert quoted(row("Architectures")) == set(ENCODERS)
    assert quoted(row("Poolings")) == set(POOLINGS)
    rest = {CONFIG: {name for kind in (BertConfig, MPNetConfig) for name in fields_of(kind)}}
    for file, keys in (CLAIMED | rest).items():
        assert quoted(row(f"`{file}`")) == set(keys), file


def fields_of(kind: type[EncoderConfig]) -> set[str]:
    fields = {field.name for field in dataclasses.fields(kind)} - {"dtype", "pooling"}
    return fields | {name for name, _, _ in kind.supported}


@in_checkout
def test_the_document_names_the_short_names_and_their_prefixes():
    for model in KNOWN_MODELS:
        if model.model_type in ENCODERS:
            cells = [cell.strip() for cell in row(f"`{model.short}`").split("|")]
            prefixes = [f"`{text}`" if text else "none" for text in (model.query_prefix, model.passage_prefix)]
            assert cells == [f"`{model.hub}`", *prefixes]
