"""Embedders in the layouts of other makers against sentence-transformers, which reads the same folders.

Each layout is tried on every side: questions, passages and texts that are neither. Unit vectors agree to 1e-5.
"""

import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from ragjax.pretrained import load_embedder
from tests import tiny_folders as layouts
from tests.tiny import write_tiny_bert, write_tiny_mpnet
from tests.tiny_folders import PROMPTS, edit, pool

pytestmark = pytest.mark.parity

TEXTS = [
    "",
    "The river runs past the OLD town",
    "Who wrote the book about the Café at the bridge? 東京",
    "the author was born in the city of the north and the war " * 4,
]


def e5(folder):
    edit(folder / "tokenizer_config.json", model_max_length=512, tokenizer_class="BertTokenizer")
    edit(folder / "sentence_bert_config.json", max_seq_length=512)


def bge(folder):
    pool(folder, "cls")
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    edit(folder / "tokenizer_config.json", do_basic_tokenize=True, never_split=None, strip_accents=None)
    edit(folder / "config_sentence_transformers.json", __version__={"sentence_transformers": "2.2.2"})


def mxbai(folder):
    pool(folder, "cls")
    layouts.drop_modules(folder, "Normalize")
    edit(folder / "config_sentence_transformers.json", prompts={"query": "Find: ", "passage": ""})


def arctic(folder):
    pool(folder, "cls")
    edit(folder / "config_sentence_transformers.json", prompts={"query": "Find: "}, default_prompt_name=None)


def default_prompt(folder):
    edit(folder / "config_sentence_transformers.json", prompts=PROMPTS, default_prompt_name="document")


def dot(folder):
    pool(folder, "cls")
    layouts.drop_modules(folder, "Normalize")
    edit(folder / "config_sentence_transformers.json", similarity_fn_name="dot", prompts={})


def largest(folder):
    pool(folder, "max")


def with_dropout(folder):
    layouts.add_module(folder, "sentence_transformers.models.Dropout", "2_Dropout")
    edit(folder / "2_Dropout" / "config.json", dropout=0.2)


def newest(folder):
    layouts.as_newest(folder)


def newest_list(folder):
    layouts.as_newest(folder, ["cls"])


def no_switch_at_all(folder):
    edit(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False)


def tokenizers_length(folder):
    edit(folder / "sentence_bert_config.json", max_seq_length=None)
    edit(folder / "tokenizer_config.json", model_max_length=20)


def cut_on_the_left(folder):
    edit(folder / "tokenizer_config.json", truncation_side="left", model_max_length=20)
    edit(folder / "sentence_bert_config.json", max_seq_length=...)


def cased_by_its_settings(folder):
    edit(folder / "tokenizer_config.json", do_lower_case=False, tokenizer_class="BertTokenizer")


def settings_of_another_class(folder):
    edit(folder / "tokenizer_config.json", do_lower_case=False, tokenizer_class="PreTrainedTokenizerFast")


def lower_case_over_a_cased_one(folder):
    cased_by_its_settings(folder)
    edit(folder / "sentence_bert_config.json", do_lower_case=True)


def vocabulary(folder):
    layouts.vocabulary_only(folder)


def cased_vocabulary(folder):
    layouts.vocabulary_only(folder, do_lower_case=False, tokenize_chinese_chars=False)


def accented_vocabulary(folder):
    layouts.vocabulary_only(folder, strip_accents=False, tokenizer_class="BertTokenizerFast")


def plain(folder):
    layouts.make_plain(folder)


def plain_with_vocabulary(folder):
    layouts.make_plain(folder)
    layouts.vocabulary_only(folder, model_max_length=30)
    for name in ("layer_norm_eps", "type_vocab_size"):
        edit(folder / "config.json", **{name: ...})


LAYOUTS = [
    e5, bge, mxbai, arctic, default_prompt, dot, largest, with_dropout, newest, newest_list, no_switch_at_all,
    tokenizers_length, cut_on_the_left, cased_by_its_settings, settings_of_another_class, lower_case_over_a_cased_one,
    vocabulary, cased_vocabulary, accented_vocabulary, plain, plain_with_vocabulary,
]  # fmt: skip


def compare(folder):
    ours = load_embedder(folder)
    theirs = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    sides = {
        ours.encode: theirs.encode,
        ours.encode_queries: theirs.encode_query,
        ours.encode_passages: theirs.encode_document,
    }
    for mine, other in sides.items():
        expected = other(TEXTS, normalize_embeddings=True)
        np.testing.assert_allclose(mine(TEXTS), expected, rtol=0, atol=1e-5, err_msg=other.__name__)
    return ours, theirs


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_bert(tmp_path, layout):
    layout(write_tiny_bert(tmp_path))
    ours, theirs = compare(tmp_path)
    assert ours.max_seq_length == theirs.max_seq_length


@pytest.mark.parametrize("layout", [dot, largest, vocabulary, cased_vocabulary, plain], ids=lambda each: each.__name__)
def test_mpnet(tmp_path, layout):
    layout(write_tiny_mpnet(tmp_path))
    compare(tmp_path)


def test_a_folder_that_the_library_has_saved(tmp_path):
    bge(write_tiny_bert(tmp_path / "old"))
    edit(tmp_path / "old" / "config_sentence_transformers.json", prompts=PROMPTS, default_prompt_name="query")
    theirs = SentenceTransformer(str(tmp_path / "old"), device="cpu", local_files_only=True)
    theirs.save(str(tmp_path / "new"))
    assert "max_seq_length" not in json.loads((tmp_path / "new" / "sentence_bert_config.json").read_text())
    before, after = compare(tmp_path / "old")[0], compare(tmp_path / "new")[0]
    assert after.max_seq_length == 64
    np.testing.assert_array_equal(before.encode(TEXTS), after.encode(TEXTS))
