"""ragjax.generation.decode: cached, batched greedy decoding equals a loop that computes everything anew."""

import dataclasses

import jax
import numpy as np
import pytest

from ragjax.data.batches import pad_tokens
from ragjax.generation import decode
from ragjax.generation.decode import greedy_decode
from ragjax.models.lora import LoraConfig
from ragjax.pretrained import init_lora, load_generator
from tests.tiny import write_tiny_llama

NEW = 9
LENGTHS = (11, 1, 17, 5)
ROWS = len(LENGTHS)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return load_generator(write_tiny_llama(tmp_path_factory.mktemp("llama"), seed=3))


@pytest.fixture(scope="module")
def prompts(generator) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, generator.config.vocab_size, length).tolist() for length in LENGTHS]


def plain_loop(generator, prompt: list[int], steps: int) -> list[int]:
    """Likeliest tokens one after the other, each from the whole text so far; no cache, no batch, no end."""
    text = list(prompt)
    for _ in range(steps):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(text)] = text
        logits = np.asarray(generator.logits(padded, np.array([len(text)])))
        text.append(int(logits[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


@pytest.fixture(scope="module")
def expected(generator, prompts) -> list[list[int]]:
    """What each prompt goes on with; the texts must differ, else rows could be mixed up unseen."""
    texts = [plain_loop(generator, prompt, NEW) for prompt in prompts]
    assert len({tuple(text) for text in texts}) == len(texts)
    return texts


@pytest.fixture(scope="module")
def ends(expected) -> tuple[int, ...]:
    """End tokens of which one ends row 0 in the middle, and one ends row 1 at once; row 2 meets neither."""
    middle = next(token for token in expected[0][2:] if token not in expected[0][:2] + expected[2])
    at_once = expected[1][0]
    assert at_once not in expected[0] + expected[2]
    return middle, at_once


def decoded(generator, prompts, ends, rows=ROWS, width=24) -> list[list[int]]:
    """The texts of all rows, fillers too; the default shape is compiled once for each `ends`."""
    tokens, lengths = pad_tokens(prompts, rows, width)
    output, counts = greedy_decode(generator.module, generator.variables, tokens, lengths, NEW, ends)
    output, counts = np.asarray(output), np.asarray(counts)
    assert output.shape == (rows, NEW)
    return [row[:count].tolist() for row, count in zip(output, counts, strict=True)]


def cut(text: list[int], ends: tuple[int, ...]) -> list[int]:
    """The text up to its first end token."""
    return text[: next((i for i, token in enumerate(text) if token in ends), len(text))]


def test_rows_of_any_length_go_on_as_in_a_plain_loop(generator, prompts, expected):
    assert decoded(generator, prompts, ends=(-1,)) == expected


def test_adapters_are_part_of_the_model(generator, prompts, expected):
    with_lora = load_generator(generator.source.path, lora=LoraConfig(4, 8.0, 0.0, ("q_proj", "v_proj", "down_proj")))
    lora = jax.tree.map(lambda leaf: leaf + 0.3, init_lora(with_lora, 0))
    with_lora = dataclasses.replace(with_lora, lora=lora)
    texts = [plain_loop(with_lora, prompt, NEW) for prompt in prompts]
    assert texts != expected
    assert decoded(with_lora, prompts, ends=(-1,)) == texts


def test_each_of_several_end_tokens_ends_its_row_alone(generator, prompts, expected, ends):
    wanted = [cut(text, ends) for text in expected]
    assert len(set(map(len, wanted))) > 2
    assert decoded(generator, prompts, ends) == wanted


def test_an_end_token_at_once_leaves_no_text(generator, prompts, expected, ends):
    assert expected[1][0] in ends
    assert decoded(generator, prompts, ends)[1] == []


def test_a_row_is_the_same_alone_in_any_company_and_under_any_padding(generator, prompts, ends):
    together = decoded(generator, prompts, ends)
    for prompt, text in zip(prompts, together, strict=True):
        assert decoded(generator, [prompt], ends) == [text, [], [], []]
    assert decoded(generator, prompts[::-1], ends)[::-1] == together
    assert decoded(generator, prompts, ends, rows=6, width=48) == [*together, [], []]


def test_decoding_stops_as_soon_as_every_row_has_ended(generator, prompts, expected, ends, monkeypatch):
    loop, turns = jax.lax.while_loop, []

    def counted_loop(*arguments):
        carry = loop(*arguments)
        turns.append(carry[0])
        return carry

    monkeypatch.setattr(decode.jax.lax, "while_loop", counted_loop)

    @jax.jit
    def count_turns(tokens, lengths):
        greedy_decode.__wrapped__(generator.module, generator.variables, tokens, lengths, NEW, ends)
        return turns.pop()

    few = [cut(text, ends) for text in expected[:2]]  # and two fillers, which must not keep the loop going
    assert 0 < max(map(len, few)) < NEW
    assert count_turns(*pad_tokens(prompts[:2], ROWS, 24)) == max(map(len, few))
    assert count_turns(*pad_tokens(prompts, ROWS, 24)) == max(len(cut(text, ends)) for text in expected) == NEW


def test_the_public_method_keeps_the_order_of_its_prompts(generator, prompts, expected):
    """`generate_tokens` groups by length, two at a time here; without the right order back, texts swap places."""
    unending = dataclasses.replace(generator, end_ids=(-1,))
    assert unending.generate_tokens(prompts, NEW, batch_size=2) == expected
    assert unending.generate_tokens([], NEW) == []
