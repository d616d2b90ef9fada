"""A cross-encoder's scores against sentence-transformers': its own tokenizer, cutting and model."""

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder

from ragjax.data.questions import Passage
from ragjax.reranking import load_cross_encoder
from tests.tiny import TEXT, write_tiny_bert, write_tiny_mpnet
from tests.tiny_folders import edit, make_cross_encoder

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
WORDS = TEXT.split()
# Short and long ones; some pairs have to be cut, on either side.
QUESTIONS = [" ".join(WORDS[start : start + 2 + 3 * start]) for start in range(12)]
PASSAGES = [
    Passage(f"p{i}", f"Title {i}" if i % 2 else "", " ".join(WORDS[i : i + 5 * (i % 9) + 1])) for i in range(12)
]


@pytest.mark.parametrize("write", [write_tiny_bert, write_tiny_mpnet])
@pytest.mark.parametrize("longest", [512, 40])
def test_scores_equal_sentence_transformers(tmp_path, write, longest):
    folder = make_cross_encoder(write(tmp_path / "model", seed=4, num_hidden_layers=3))
    edit(folder / "tokenizer_config.json", model_max_length=longest)
    theirs = CrossEncoder(str(folder), device="cpu", local_files_only=True, activation_fn=torch.nn.Identity())
    pairs = [(question, passage) for question in QUESTIONS for passage in PASSAGES]
    expected = theirs.predict([(question, passage.embedder_text) for question, passage in pairs])
    ours = load_cross_encoder(folder)
    scores, cost = ours.score([question for question, _ in pairs], [passage for _, passage in pairs])
    assert np.ptp(expected) > 100 * TOLERANCE
    np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)
    assert ours.max_seq_length == min(longest, 512)
    lengths = [
        len(theirs.tokenizer(question, passage.embedder_text, truncation=True, max_length=longest)["input_ids"])
        for question, passage in pairs
    ]
    assert cost.tokens == sum(lengths)
    assert (max(lengths) == longest) == (longest == 40)
