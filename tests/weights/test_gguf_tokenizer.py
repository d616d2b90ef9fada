"""ragjax.weights.gguf_tokenizer: hand-worked ids of every kind of tokenizer in a GGUF file, and what is refused."""

import gguf as package
import pytest

from ragjax.errors import UserError
from ragjax.weights import load_tokenizer, resolve_model
from ragjax.weights.gguf_tokenizer import CUTS, byte_level_backend, sentencepiece_backend
from tests.tiny import write_tiny_gguf

NORMAL, UNKNOWN, CONTROL, DEFINED, UNUSED, BYTE = (
    package.TokenType[name] for name in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE")
)


def instead(monkeypatch, **calls):
    """Makes GGUFWriter's methods write something else."""
    for method, write in calls.items():
        monkeypatch.setattr(package.GGUFWriter, method, write)


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(resolve_model(path))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# ---- byte-level -----------------------------------------------------------------------------------------------------

SYMBOLS = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "č", "Ã", "©", "Ì", "ģ"]


def byte_level(pre, merges=(), more=()):
    tokens = [*SYMBOLS, *("".join(merge) for merge in merges), *more]
    return byte_level_backend(tokens, merges, [NORMAL] * len(tokens), CUTS[pre])


def pieces(pre, text):
    """How a text is cut before anything is merged."""
    backend = byte_level(pre)
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "in 1984", ["in", "Ġ", "1", "9", "8", "4"]),
        ("llama-bpe", "in 19845", ["in", "Ġ", "198", "45"]),
        ("qwen2", "in 1984", ["in", "Ġ", "1", "9", "8", "4"]),
        ("llama-bpe", "we'LL go", ["we", "'LL", "Ġgo"]),
        ("smollm", "we'LL go", ["we", "'", "LL", "Ġgo"]),
        ("llama-bpe", "(river)bank", ["(river", ")bank"]),
        ("smollm", "(river)bank", ["(", "river", ")", "bank"]),
        ("qwen2", "end.\n\nNext", ["end", ".ĊĊ", "Next"]),
        ("smollm", "end.\n\nNext", ["end", ".", "Ċ", "Ċ", "Next"]),
        ("llama-bpe", "a  \n b", ["a", "ĠĠĊ", "Ġb"]),
        ("qwen2", "a   b ", ["a", "ĠĠ", "Ġb", "Ġ"]),
    ],
)
def test_texts_are_cut_as_the_name_says(pre, text, expected):
    assert pieces(pre, text) == expected


def test_names_of_one_cut():
    assert CUTS["llama3"] is CUTS["llama-v3"] is CUTS["llama-bpe"]
    assert CUTS["deepseek-r1-qwen"] is CUTS["qwen2"]


def test_digits_are_not_merged_even_where_a_merge_would_join_them():
    backend = byte_level_backend(["1", "2", "12", "a"], [("1", "2")], [NORMAL] * 4, CUTS["smollm"])
    assert backend.encode("a12").ids == [3, 0, 1]
    backend = byte_level_backend(["1", "2", "12", "a"], [("1", "2")], [NORMAL] * 4, CUTS["llama-bpe"])
    assert backend.encode("a12").ids == [3, 2]


def test_llama_3_takes_a_word_of_its_vocabulary_whatever_the_merges_say():
    merges = [("i", "n"), ("r", "i")]  # which make "r", "in", and never the word
    assert byte_level("llama-bpe", merges, ["rin"]).encode("rin").tokens == ["rin"]
    assert byte_level("qwen2", merges, ["rin"]).encode("rin").tokens == ["r", "in"]


def test_qwen_composes_characters():
    """e and a combining acute accent are the two bytes of é; for Llama 3 they stay three."""
    text = "e\N{COMBINING ACUTE ACCENT}"
    assert byte_level("qwen2").encode(text).tokens == ["Ã", "©"]
    assert byte_level("llama-bpe").encode(text).tokens == ["e", "Ì", "ģ"]


def test_user_defined_tokens_are_matched_in_text():
    tokens = ["<s>", "<think>", "a", "b", "<", ">"]
    backend = byte_level_backend(tokens, [], [CONTROL, DEFINED, NORMAL, NORMAL, NORMAL, NORMAL], CUTS["smollm"])
    backend.encode_special_tokens = True
    assert backend.encode("a<think>b").ids == [2, 1, 3]
    assert backend.encode("<s>").ids == [4, 5]  # "s" is not in this vocabulary
    assert backend.decode([0, 2, 1], skip_special_tokens=True) == "a<think>"


# ---- SentencePiece --------------------------------------------------------------------------------------------------

PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    "<0x0A>",
    "<0xC3>",
    "<0xA9>",
    "▁",
    "a",
    "b",
    "c",
    "ab",
    "bc",
    "▁a",
    "▁ab",
    "abc",
    "<u>",
]
KINDS = [UNKNOWN, CONTROL, CONTROL, BYTE, BYTE, BYTE, *[NORMAL] * 9, DEFINED]
# "bc" before "ab" before the rest; "▁ab" is never reached by way of "ab" where "bc" took the b.
SCORES = [0, 0, 0, 0, 0, 0, -9, -9, -9, -9, -2, -1, -4, -5, -3, 0]


def sentencepiece(prefix=True):
    backend = sentencepiece_backend(PIECES, SCORES, KINDS, prefix)
    backend.encode_special_tokens = True
    return backend


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("ab", ["▁ab"]),
        ("abc", ["▁", "abc"]),  # bc, then a + bc: -3 comes before ▁ + a: -4
        ("a b", ["▁a", "▁", "b"]),
        ("a  b", ["▁a", "▁", "▁", "b"]),
        ("a\né", ["▁a", "<0x0A>", "<0xC3>", "<0xA9>"]),
        ("x", ["▁", "<unk>"]),  # its byte is not in this vocabulary
        ("a<u>b", ["▁a", "<u>", "▁", "b"]),  # what follows a matched token is a text of its own
        ("c<s>", ["▁", "c", "<unk>"]),
    ],
)
def test_sentencepiece_by_hand(text, tokens):
    assert sentencepiece().encode(text).tokens == tokens


def test_scores_say_what_is_merged_first():
    scores = [*SCORES]
    scores[PIECES.index("▁a")] = -2.5  # before abc
    backend = sentencepiece_backend(PIECES, scores, KINDS, True)
    assert backend.encode("abc").tokens == ["▁a", "bc"]


def test_without_the_prefix_a_text_starts_as_it_is():
    assert sentencepiece(prefix=False).encode("ab a").tokens == ["ab", "▁a"]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", ["abc a  ab", "a\né", " a"])
def test_decoding_undoes_encoding(prefix, text):
    backend = sentencepiece(prefix)
    assert backend.decode(backend.encode(text).ids) == text


def test_a_piece_that_is_out_of_use_is_never_made():
    kinds = [*KINDS]
    kinds[PIECES.index("bc")] = UNUSED
    backend = sentencepiece_backend(PIECES, SCORES, kinds, True)
    assert backend.encode("abc").tokens == ["▁", "abc"]  # by way of ab
    assert backend.encode("bc").tokens == ["▁", "b", "c"]


# ---- whole files ----------------------------------------------------------------------------------------------------


def write_sentencepiece(path, monkeypatch, **settings):
    """A tiny model whose file holds a SentencePiece tokenizer of 384 pieces."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 5]
    tokens += [f"<spare{i}>" for i in range(384 - len(tokens))]
    kinds += [UNUSED] * (384 - len(kinds))

    def tokenizer(self, _):
        self.add_string("tokenizer.ggml.model", "llama")
        self.add_array("tokenizer.ggml.tokens", tokens)
        self.add_token_scores([0.0 if kind != NORMAL else -1.0 - i for i, kind in enumerate(kinds)])

    nothing = lambda self, _: None  # noqa: E731
    add_kinds = package.GGUFWriter.add_token_types
    instead(
        monkeypatch,
        add_tokenizer_model=tokenizer,
        add_tokenizer_pre=nothing,
        add_token_list=nothing,
        add_token_merges=nothing,
        add_token_types=lambda self, _: add_kinds(self, kinds),
        add_add_bos_token=nothing,
    )

    def edit(writer):
        for name, value in settings.items():
            writer.add_key_value(f"tokenizer.ggml.{name}", value, package.GGUFValueType.get_type(value))

    return write_tiny_gguf(path, edit=edit)


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({}, [1, 262, 261]),  # <s> ▁a b: the first token is put unless the file says not
        ({"add_bos_token": False}, [262, 261]),
        ({"add_bos_token": False, "add_space_prefix": False}, [263]),
        ({"add_eos_token": True}, [1, 262, 261, 2]),
        ({"remove_extra_whitespaces": False, "cls_token_id": 1}, [1, 262, 261]),
    ],
)
def test_a_file_with_sentencepiece(tmp_path, monkeypatch, settings, ids):
    tokenizer = load_tokenizer(resolve_model(write_sentencepiece(tmp_path / "a.gguf", monkeypatch, **settings)))
    assert tokenizer("ab")["input_ids"] == ids
    assert tokenizer.decode(tokenizer("a\nb")["input_ids"], skip_special_tokens=True) == "a\nb"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize(
    ("pre", "written", "starts"),
    [
        ("smollm", None, False),
        ("qwen2", None, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("smollm", True, True),
    ],
)
def test_a_byte_level_file_gets_its_first_token(tmp_path, monkeypatch, pre, written, starts):
    instead(
        monkeypatch,
        add_tokenizer_pre=lambda self, _: self.add_string("tokenizer.ggml.pre", pre),
        add_add_bos_token=lambda self, _: (
            None if written is None else self.add_bool("tokenizer.ggml.add_bos_token", written)
        ),
    )
    tokenizer = load_tokenizer(resolve_model(write_tiny_gguf(tmp_path / "tiny.gguf")))
    assert (tokenizer("hm")["input_ids"][0] == 1) is starts
    assert 1 not in tokenizer("hm", add_special_tokens=False)["input_ids"]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("add_tokenizer_pre", "tokenizer.ggml.pre", "tekken"),
        ("add_tokenizer_pre", "tokenizer.ggml.pre", None),
        ("add_tokenizer_model", "tokenizer.ggml.model", "t5"),
    ],
)
def test_a_tokenizer_of_another_kind_is_named(tmp_path, monkeypatch, method, key, value):
    instead(monkeypatch, **{method: lambda self, _: None if value is None else self.add_string(key, value)})
    message = refusal(write_tiny_gguf(tmp_path / "tiny.gguf"))
    assert f"{key} {value!r}" in message
    assert "only 'llama' and 'gpt2' with 'smollm', 'llama-bpe'" in message


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("add_space_prefix", True, "True"),
        ("remove_extra_whitespaces", True, "True"),
        ("precompiled_charsmap", [1, 2], "[1, 2]"),
        ("invented", "x", "x"),
    ],
)
def test_a_setting_that_is_not_followed_is_named(tmp_path, name, value, shown):
    key = f"tokenizer.ggml.{name}"

    def edit(writer):
        writer.add_array(key, value) if isinstance(value, list) else writer.add_key_value(
            key, value, package.GGUFValueType.get_type(value)
        )

    assert f"the setting {key} = {shown} is not supported" in refusal(write_tiny_gguf(tmp_path / "a.gguf", edit=edit))


@pytest.mark.parametrize(
    ("method", "replace"),
    [
        ("add_token_list", lambda tokens: tokens[:50]),
        ("add_token_types", lambda types: types[:-1]),
        ("add_token_merges", lambda merges: [*merges, "no-such token"]),
        ("add_token_merges", lambda merges: [*merges, "unsplit"]),
    ],
)
def test_incomplete_tokenizer_data(tmp_path, monkeypatch, method, replace):
    write = getattr(package.GGUFWriter, method)
    instead(monkeypatch, **{method: lambda self, value: write(self, replace(value))})
    assert "incomplete or damaged" in refusal(write_tiny_gguf(tmp_path / "tiny.gguf"))


def test_an_end_token_beyond_the_vocabulary(tmp_path, monkeypatch):
    write = package.GGUFWriter.add_eos_token_id
    instead(monkeypatch, add_eos_token_id=lambda self, _: write(self, 100_000))
    sentence = "eos_token_id = 100000, but the model's vocabulary ends at 383"
    assert sentence in refusal(write_tiny_gguf(tmp_path / "tiny.gguf"))
