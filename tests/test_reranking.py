"""Re-rankers on tiny models; tests/parity compares a cross-encoder's scores with sentence-transformers'."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ragjax.data.questions import Passage
from ragjax.errors import UserError
from ragjax.pretrained import load_generator
from ragjax.reranking import QuestionLikelihood, load_cross_encoder
from tests.tiny import write_tiny_bert, write_tiny_llama, write_tiny_mpnet
from tests.tiny_folders import edit, make_cross_encoder

PASSAGES = [Passage(f"p{i}", f"Title {i}", "the river runs past the old town " * (i % 4 + 1)) for i in range(9)]
QUESTIONS = [f"which town is number {i}, " + "the old one " * (i % 3) for i in range(9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_cross_encoder(write_tiny_bert(tmp_path_factory.mktemp("cross") / "bert"))


def test_a_score_does_not_depend_on_the_other_pairs(folder):
    ranker = load_cross_encoder(folder)
    together, cost = ranker.score(QUESTIONS, PASSAGES)
    for i in (0, 4, 8):
        alone, own = ranker.score(QUESTIONS[i : i + 1], PASSAGES[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], rtol=0, atol=1e-5)
        assert 0 < own.tokens < cost.tokens
    assert np.ptp(together) > 1e-3
    assert ranker.describe()["sha256"] == ranker.source.sha256
    assert ranker.score([], [])[0].shape == (0,)


def test_the_second_text_is_of_the_second_kind(folder, tmp_path):
    """Without the embedding of token type 1 the scores are others; the tokens are the same."""
    ranker = load_cross_encoder(folder)
    types = ranker.params["backbone"]["embeddings"]["token_type_embeddings"]["embedding"]
    params = jax.tree.map(lambda leaf: leaf.at[1].set(0) if leaf is types else leaf, ranker.params)
    changed = dataclasses.replace(ranker, params=params)
    assert np.abs(changed.score(QUESTIONS, PASSAGES)[0] - ranker.score(QUESTIONS, PASSAGES)[0]).min() > 1e-4


def test_a_folder_that_is_no_cross_encoder(tmp_path):
    embedder = write_tiny_mpnet(tmp_path / "embedder")
    with pytest.raises(UserError, match=r"config.json describes 2 labels where a re-ranker gives one score: give --re"):
        load_cross_encoder(embedder)
    edit(embedder / "config.json", id2label={"0": "LABEL_0"})
    with pytest.raises(UserError, match=r"classifier\.(dense|out_proj)\.\w+ .*missing"):
        load_cross_encoder(embedder)
    with pytest.raises(UserError, match=r"model_type = 'llama', which is no cross-encoder .*\(bert, mpnet\)"):
        load_cross_encoder(write_tiny_llama(tmp_path / "llama"))


def test_a_classifier_of_several_classes_is_refused(folder, tmp_path):
    other = make_cross_encoder(write_tiny_bert(tmp_path / "bert"))
    edit(other / "config.json", id2label={"0": "no", "1": "perhaps", "2": "yes"})
    with pytest.raises(UserError, match="describes 3 labels"):
        load_cross_encoder(other)
    edit(other / "config.json", id2label={"0": "yes"})
    weights = load_file(other / "model.safetensors")
    weights["classifier.weight"] = np.zeros((2, 32), np.float32)
    save_file(weights, other / "model.safetensors")
    with pytest.raises(
        UserError, match=r"classifier\.weight .* has the shape \(2, 32\), but config.json asks for \(1, 32"
    ):
        load_cross_encoder(other)
    assert json.loads((folder / "config.json").read_text())["id2label"] == {"0": "LABEL_0"}


def test_where_a_pair_is_cut(tmp_path):
    """Of the library's own limit and the tokenizer's the smaller one; what lies behind it changes nothing."""
    folder = make_cross_encoder(write_tiny_bert(tmp_path / "bert"))
    edit(folder / "tokenizer_config.json", model_max_length=10**30)
    assert load_cross_encoder(folder).max_seq_length == 512
    edit(folder / "tokenizer_config.json", model_max_length=40)
    edit(folder / "sentence_bert_config.json", max_seq_length=30)
    ranker = load_cross_encoder(folder)
    assert ranker.max_seq_length == 30
    long = [Passage("p", "", "the river runs past the old town " * 9 + end) for end in ("by night", "at noon")]
    (one, other), cost = ranker.score(QUESTIONS[:1] * 2, long)
    assert (one, cost.tokens) == (other, 60)
    edit(folder / "config_sentence_transformers.json", default_prompt_name="query", prompts={"query": "q: "})
    with pytest.raises(UserError, match=r"default_prompt_name.*not supported for --rerank: set it to null"):
        load_cross_encoder(folder)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return load_generator(write_tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize("most", [256, 3])
def test_the_likelihood_of_a_question_after_a_passage(generator, most):
    """Against the logits of the whole text, passages cut to `most` tokens."""

    def ids(text):
        return generator.tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts, asked = [], [ids(f" {question}") for question in QUESTIONS[:3]]
    for passage in PASSAGES[1:4]:
        text = ids(f" {passage.title}. {passage.text}")[:most]
        end = ids("\nPlease write a question based on this passage.\nQuestion:")
        prompts.append([*generator.prompt_ids("Passage:"), *text, *end])
    lengths = np.array([len(prompt) + len(own) for prompt, own in zip(prompts, asked, strict=True)])
    padded = np.zeros((3, 192), np.int32)
    for row, (prompt, own) in enumerate(zip(prompts, asked, strict=True)):
        padded[row, : lengths[row]] = prompt + own
    logits = np.asarray(generator.logits(padded, lengths), np.float64)
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    expected = [
        log_probs[row, np.arange(len(prompt) - 1, lengths[row] - 1), own].mean()
        for row, (prompt, own) in enumerate(zip(prompts, asked, strict=True))
    ]
    scores, cost = QuestionLikelihood(generator, most).score(QUESTIONS[:3], PASSAGES[1:4])
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    assert cost.tokens == lengths.sum()
    assert np.ptp(expected) > 1e-3


def test_a_question_without_room_for_a_passage(generator):
    likelihood = QuestionLikelihood(generator, 256)
    with pytest.raises(UserError, match="too long for --rerank=generator"):
        likelihood.score(["town " * 600], PASSAGES[:1])
