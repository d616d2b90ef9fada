"""Joined pieces have the ids of the whole string, with tokenizers of every kind, which are trained here."""

import dataclasses
import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ragjax.data.pieces import Pieces
from ragjax.data.prompts import PromptBuilder, prompt_text
from ragjax.data.questions import Passage
from ragjax.pretrained import load_generator
from tests.tiny import TEXT, write_tiny_llama

EOS, WIDE = 1, 100_000
SPECIALS = ["<unk>", "</s>", "<s>"]
LEARNED = [*TEXT.splitlines(), "Paris is in France. Lyon (1947), 'Arles' and e.g. Nîmes: a b c d f h j k l m;"] * 3
PASSAGES = [
    Passage("a", "Paris", "The river runs past the old town, under 3 bridges, to the sea."),
    Passage("b", "", "No title; it ends with a word"),
    Passage("c", "1987", "A year (of the north)"),
    Passage("d", "Łódź — ünïcode", "Zażółć gęślą jaźń. 東京 🗼 <s> naïve!"),
    Passage("e", "Town", "a blank line\n\ninside, and  two spaces?"),
]
ANSWERS = ["Paris", "1947", "the old town", "(a) Arles", "Łódź"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(add_prefix_space=False, regex=None):
    """GPT-2's tokenizer, or with Llama 3's split."""
    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Split(Regex(regex), "isolated")] if regex else []
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=regex is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    # Line breaks behind punctuation are frequent, so that they are merged where the split lets them.
    tokenizer.train_from_iterator([f"{line}\n\n### Answer:\n{line}\n\n" for line in LEARNED], trainer)
    return tokenizer


def sentencepiece_bpe(by_normalizer):
    """LLaMA-2's tokenizer in both forms of its conversion: the mark comes from a normalizer, or from Metaspace."""
    split = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = split
    learned.train_from_iterator(
        LEARNED, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, show_progress=False)
    )
    model = json.loads(learned.to_str())["model"]
    vocabulary = model["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(SPECIALS)
    if by_normalizer:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def unigram(line_breaks_are_blanks):
    """SentencePiece's Unigram; its usual normalisation makes every kind of white space a blank."""
    tokenizer = Tokenizer(models.Unigram())
    if line_breaks_are_blanks:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIALS, unk_token="<unk>", initial_alphabet=["\n"], show_progress=False
    )
    tokenizer.train_from_iterator(LEARNED, trainer)
    return without_ties(tokenizer)


def without_ties(tokenizer):
    """Other scores for the same words, no two of which add up alike.

    The trainer gives equal ones to words that it has seen equally often, and where two ways to cut a text then tie,
    the one that is taken depends on what stands before it.
    """
    settings = json.loads(tokenizer.to_str())
    words = [word for word, _ in settings["model"]["vocab"]]
    learned = sorted(words[len(SPECIALS) :])
    scores = {word: -8.0 - (i * 0.6180339887) % 1 for i, word in enumerate(learned)}
    settings["model"]["vocab"] = [[word, scores.get(word, 0.0)] for word in [*words[: len(SPECIALS)], *learned]]
    return Tokenizer.from_str(json.dumps(settings))


KINDS = {
    "byte-level": byte_level,
    "byte-level with a blank in front": lambda: byte_level(add_prefix_space=True),
    "byte-level with Llama 3's split": lambda: byte_level(regex=LLAMA3),
    "LLaMA-2 by normalizer": lambda: sentencepiece_bpe(by_normalizer=True),
    "LLaMA-2 by Metaspace": lambda: sentencepiece_bpe(by_normalizer=False),
    "Unigram": lambda: unigram(line_breaks_are_blanks=False),
    "Unigram without line breaks": lambda: unigram(line_breaks_are_blanks=True),
}
MARKED = [kind for kind in KINDS if kind.startswith(("LLaMA", "Unigram"))]


@pytest.fixture(scope="module")
def backends():
    return {kind: make() for kind, make in KINDS.items()}


@pytest.fixture
def tokenizer(request, backends):
    """With <s> in front of every text, as LLaMA has it."""
    backend = Tokenizer.from_str(backends[request.param].to_str())
    first = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[first])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, split_special_tokens=True, clean_up_tokenization_spaces=False
    )


every_kind = pytest.mark.parametrize("tokenizer", KINDS, indirect=True)


@every_kind
def test_one_passage_and_an_answer_have_the_ids_of_the_whole_string(tokenizer):
    prompts = PromptBuilder(tokenizer, EOS, WIDE, WIDE)
    for passage in PASSAGES:
        whole = prompt_text([passage], "Where is it?")
        for answer in ANSWERS:
            ids = [*prompts.prompt([passage], "Where is it?", 0).ids, *prompts.answer(answer)]
            assert ids == [*tokenizer(whole + answer)["input_ids"], EOS]


@every_kind
def test_several_passages_have_the_ids_of_the_whole_string(tokenizer):
    prompts = PromptBuilder(tokenizer, EOS, WIDE, WIDE)
    for passages in (PASSAGES, PASSAGES[::-1]):
        whole = tokenizer(prompt_text(passages, "Who (and why)?") + "a")["input_ids"]
        assert [*prompts.prompt(passages, "Who (and why)?", 0).ids, *prompts.answer("a")[:-1]] == whole


@every_kind
def test_answers_read_back_as_they_were_given(tokenizer):
    prompts = PromptBuilder(tokenizer, EOS, WIDE, WIDE)
    for answer in ANSWERS[:4]:
        assert tokenizer.decode(prompts.answer(answer)[:-1], clean_up_tokenization_spaces=False) == answer


@pytest.mark.parametrize("tokenizer", MARKED, indirect=True)
def test_the_mark_of_a_word_stands_in_no_piece_that_has_no_blank_before_it(tokenizer):
    """What these tokenizers put before a text: in the whole there is a line break, unless that counts as a blank."""
    alone = tokenizer.convert_ids_to_tokens(tokenizer("Paris", add_special_tokens=False)["input_ids"])
    assert alone[0].startswith("▁")
    inside = tokenizer.convert_ids_to_tokens(Pieces(tokenizer).inner("Paris"))
    has_blank = tokenizer.backend_tokenizer.normalizer is not None and "Nmt" in repr(
        tokenizer.backend_tokenizer.normalizer
    )
    assert inside[0].startswith("▁") == has_blank
    assert "".join(inside).removeprefix("▁") == "Paris"


@every_kind
def test_a_frame_is_no_shorter_than_the_prompt_without_its_passages(tokenizer):
    """Windows and compiled shapes are planned by it."""
    prompts = PromptBuilder(tokenizer, EOS, WIDE, WIDE)
    ids = prompts.prompt(PASSAGES, "Where?", 0).ids
    assert len(ids) <= prompts.frame_length("Where?", len(PASSAGES)) + sum(len(prompts.passage(p)) for p in PASSAGES)


@every_kind
def test_cut_passages_are_the_starts_of_whole_ones(tokenizer):
    cut, whole = PromptBuilder(tokenizer, EOS, 5, WIDE), PromptBuilder(tokenizer, EOS, WIDE, WIDE)
    short = [len(whole.passage(passage)) <= 5 for passage in PASSAGES]
    assert not any(short)
    assert [cut.passage(passage) for passage in PASSAGES] == [whole.passage(passage)[:5] for passage in PASSAGES]
    assert len(cut.prompt(PASSAGES, "Where?", 0).ids) == cut.frame_length("Where?", 5) + 5 * 5


TEMPLATE = "{{ '<s>[INST] ' + messages[0]['content'] + ' [/INST]' }}"


@pytest.mark.parametrize("tokenizer", KINDS, indirect=True)
def test_a_chat_template_has_the_ids_of_the_whole_string(tokenizer):
    pytest.importorskip("jinja2", reason="transformers fills chat templates with jinja2, which is not installed")
    tokenizer.chat_template = TEMPLATE
    prompts = PromptBuilder(tokenizer, EOS, WIDE, WIDE, style="chat")
    text = f"<s>[INST] {prompt_text(PASSAGES[:1], 'Where?')} [/INST]"
    whole = tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    assert prompts.prompt(PASSAGES[:1], "Where?", 0).ids == whole
    assert whole[0] == tokenizer.convert_tokens_to_ids("<s>")


@pytest.mark.parametrize("tokenizer", MARKED[:1], indirect=True)
def test_a_generators_answers_are_those_behind_a_line_break(tmp_path, tokenizer):
    generator = dataclasses.replace(load_generator(write_tiny_llama(tmp_path)), tokenizer=tokenizer)
    whole = tokenizer("a\nParis", add_special_tokens=False)["input_ids"]
    assert generator.answer_ids("Paris") == [
        *whole[len(tokenizer("a\n", add_special_tokens=False)["input_ids"]) :],
        generator.eos_token_id,
    ]
