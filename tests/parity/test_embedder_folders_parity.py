"""Embedders in the layouts of other makers against sentence-transformers, which reads the same folders.

Each layout is tried on every side: questions, passages and texts that are neither. Unit vectors agree to 1e-5.
"""

import dataclasses
import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from ragjax.config import RunConfig
from ragjax.exporting import export_run
from ragjax.pretrained import load_embedder
from tests import tiny_folders as layouts
from tests.tiny import write_tiny_bert, write_tiny_llama, write_tiny_mpnet
from tests.tiny_exports import nudged, write_run
from tests.tiny_folders import PROMPTS, edit

pytestmark = pytest.mark.parity

TEXTS = [
    "",
    "The river runs past the OLD town",
    "Who wrote the book about the Café at the bridge? 東京",
    "the author was born in the city of the north and the war " * 4,
]


def compare(folder, ours=None, tolerance=1e-5):
    """Both embedders, after their vectors were compared; `ours` is loaded from the folder too by default."""
    ours = ours or load_embedder(folder)
    theirs = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    sides = {
        ours.encode: theirs.encode,
        ours.encode_queries: theirs.encode_query,
        ours.encode_passages: theirs.encode_document,
    }
    for mine, other in sides.items():
        expected = other(TEXTS, normalize_embeddings=True)
        np.testing.assert_allclose(mine(TEXTS), expected, rtol=0, atol=tolerance, err_msg=other.__name__)
    return ours, theirs


@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=lambda layout: layout.__name__)
def test_bert(tmp_path, layout):
    layout(write_tiny_bert(tmp_path))
    ours, theirs = compare(tmp_path)
    assert ours.max_seq_length == theirs.max_seq_length


@pytest.mark.parametrize("name", ["dot", "largest", "vocabulary", "cased_vocabulary", "plain"])
def test_mpnet(tmp_path, name):
    getattr(layouts, name)(write_tiny_mpnet(tmp_path))
    compare(tmp_path)


def test_a_folder_that_the_library_has_saved(tmp_path):
    layouts.bge(write_tiny_bert(tmp_path / "old"))
    edit(tmp_path / "old" / "config_sentence_transformers.json", prompts=PROMPTS, default_prompt_name="query")
    theirs = SentenceTransformer(str(tmp_path / "old"), device="cpu", local_files_only=True)
    theirs.save(str(tmp_path / "new"))
    assert "max_seq_length" not in json.loads((tmp_path / "new" / "sentence_bert_config.json").read_text())
    before, after = compare(tmp_path / "old")[0], compare(tmp_path / "new")[0]
    assert after.max_seq_length == 64
    np.testing.assert_array_equal(before.encode(TEXTS), after.encode(TEXTS))


OVERRIDES = {"own": {}, "given": {"query_prefix": "Q: ", "passage_prefix": "P: "}, "none": {"query_prefix": ""}}


@pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES.keys())
@pytest.mark.parametrize("name", ["arctic", "default_prompt", "dot", "largest", "newest", "plain_with_vocabulary"])
def test_what_is_exported_is_what_was_used(tmp_path, name, overrides):
    """Trained weights, the run's prefixes, and unit length in the folder itself."""
    folder = write_tiny_bert(tmp_path / "bert")
    getattr(layouts, name)(folder)
    embedder = load_embedder(folder, **overrides)
    embedder = dataclasses.replace(embedder, params=nudged(embedder.params))
    generator = write_tiny_llama(tmp_path / "llama")
    config = RunConfig(embedder=str(folder), generator=str(generator), **overrides)
    write_run(tmp_path / "run", config, {"joint": {"embedder": {"params": embedder.params}}})
    exported = export_run(tmp_path / "run", tmp_path / "out") / "embedder"
    _, theirs = compare(exported, embedder, tolerance=1e-4)
    compare(exported)
    np.testing.assert_allclose(np.linalg.norm(theirs.encode(TEXTS), axis=1), 1, atol=1e-5)
    assert load_embedder(exported).prefixes == embedder.prefixes
