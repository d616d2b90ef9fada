"""ragjax.weights.wordpiece: ids worked out by hand, from vocab.txt and from settings that change tokenizer.json."""

import json

import pytest

from ragjax.errors import UserError
from ragjax.weights import load_tokenizer, resolve_model
from tests.tiny import write_tiny_bert, write_tiny_mpnet
from tests.tiny_folders import edit, vocabulary_only

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "river",
    "River",
    "cafe",
    "caf\u00e9",
    "un",
    "##able",
    "\u6771",
    "##\u4eac",
]
RIVER, CAPITAL_RIVER, CAFE, ACCENTED_CAFE, UN, ABLE, EAST, CAPITAL = range(5, 13)
TEXT = "River Caf\u00e9 unable \u6771\u4eac"


@pytest.fixture
def folder(tmp_path):
    """A BERT with a vocabulary of 13 tokens and nothing else that says how text is cut."""
    write_tiny_bert(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return tmp_path


def ids(folder, text=TEXT):
    return load_tokenizer(resolve_model(folder))(text)["input_ids"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [2, RIVER, CAFE, UN, ABLE, EAST, 1, 3]),
        ({"do_lower_case": True}, [2, RIVER, CAFE, UN, ABLE, EAST, 1, 3]),
        ({"do_lower_case": False}, [2, CAPITAL_RIVER, 1, UN, ABLE, EAST, 1, 3]),
        ({"strip_accents": False}, [2, RIVER, ACCENTED_CAFE, UN, ABLE, EAST, 1, 3]),
        ({"do_lower_case": False, "strip_accents": True}, [2, CAPITAL_RIVER, 1, UN, ABLE, EAST, 1, 3]),
        ({"tokenize_chinese_chars": False}, [2, RIVER, CAFE, UN, ABLE, EAST, CAPITAL, 3]),
        ({"tokenizer_class": "BertTokenizerFast"}, [2, RIVER, CAFE, UN, ABLE, EAST, 1, 3]),
    ],
)
def test_ids_from_a_vocabulary_alone(folder, settings, expected):
    edit(folder / "tokenizer_config.json", **settings)
    assert ids(folder) == expected


def test_a_vocabulary_without_any_settings(folder):
    assert ids(folder) == [2, RIVER, CAFE, UN, ABLE, EAST, 1, 3]
    assert ids(folder, "[SEP] river") == [2, 1, 1, 1, RIVER, 3]  # a special token's string is text


def test_mpnets_special_tokens(tmp_path):
    write_tiny_mpnet(tmp_path)
    before = ids(tmp_path, "The river, the TOWN")
    vocabulary_only(tmp_path, unk_token=..., cls_token=..., sep_token=..., bos_token=..., eos_token=..., pad_token=...)
    assert ids(tmp_path, "The river, the TOWN") == before
    tokenizer = load_tokenizer(resolve_model(tmp_path))
    assert before[0] == tokenizer.cls_token_id == 0 and before[-1] == tokenizer.sep_token_id == 2


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_behind_the_vocabulary(folder, where):
    added = {"qqq": 13, "www": 14}
    entries = {str(number): {"content": token, "special": False} for token, number in added.items()}
    edit(folder / where, **(added if where == "added_tokens.json" else {"added_tokens_decoder": entries}))
    assert ids(folder, "river www qqq") == [2, RIVER, 14, 13, 3]
    edit(folder / "added_tokens.json", zzz=17)
    with pytest.raises(UserError, match="gives the token 'zzz' the id 17, but beside this vocab.txt it is 15"):
        ids(folder)


def test_settings_go_before_what_tokenizer_json_says(tmp_path):
    """As in transformers, for the class that it builds from them; another class is taken as it is stored."""
    write_tiny_bert(tmp_path)
    lowered = ids(tmp_path, "The river")
    edit(tmp_path / "tokenizer_config.json", do_lower_case=False)
    assert ids(tmp_path, "The river") != lowered
    assert ids(tmp_path, "the river") == lowered
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert ids(tmp_path, "The river") == lowered
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    assert ids(tmp_path, "The river") == lowered  # a normaliser of another kind stays


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer_class": "BertJapaneseTokenizer"}, "only a BertTokenizer is made, not a BertJapaneseTokenizer"),
        ({"do_lower_case": "yes"}, "tokenizer_config.json has do_lower_case = 'yes' where true or false is needed"),
        ({"cls_token": "[START]"}, "lacks the cls_token '\\[START\\]'"),
        ({"unk_token": "<unk>"}, "lacks the unk_token '<unk>'"),
    ],
)
def test_what_is_refused(folder, change, words):
    edit(folder / "tokenizer_config.json", **change)
    with pytest.raises(UserError, match=words):
        ids(folder)


def test_an_unreadable_vocabulary(folder):
    (folder / "vocab.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="vocab.txt"):
        ids(folder)
