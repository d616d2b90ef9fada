"""A ranking step's loss against sentence-transformers: its own model, tokenizer and MultipleNegativesRankingLoss."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from ragjax.config import RunConfig
from ragjax.costs import Ledger
from ragjax.data.dataset import Dataset
from ragjax.data.passages import PassageList
from ragjax.data.questions import Passage, Question
from ragjax.parallel import ONE_DEVICE
from ragjax.pretrained import load_embedder
from ragjax.retrieval import ArrayVectors, ExactIndex, Queries, Retriever
from ragjax.training.signals import RankingAssembler
from ragjax.training.step import make_eval_step, means
from tests.tiny import TEXT, write_tiny_bert
from tests.tiny_runs import batch_of, run_of

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
BATCH = 6
# Sentences of different lengths; what they say does not matter to a random model.
TEXTS = [" ".join(TEXT.split()[start : start + 3 + 2 * start % 19]) for start in range(40)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same tiny model, here and there, and one world of passages around it."""
    folder = write_tiny_bert(tmp_path_factory.mktemp("bert"), seed=9)
    ours, theirs = load_embedder(folder), SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    passages = [Passage(f"p{i}", f"Title {i}" if i % 3 else "", text) for i, text in enumerate(TEXTS[:28])]
    vectors = ours.encode([passage.embedder_text for passage in passages])
    retriever = Retriever(ExactIndex(vectors), ArrayVectors(vectors))
    return SimpleNamespace(embedder=ours, store=PassageList(passages), retriever=retriever), theirs


def nearest(pipeline, texts: list[str], k: int) -> np.ndarray:
    """Passage rows [B, k], best first."""
    return pipeline.retriever.retrieve(Queries(texts, pipeline.embedder.encode_queries(texts)), k).passage_rows


def labelled_questions(pipeline, hard: int) -> list[Question]:
    """Questions whose positives are nobody's hard negative: sentence-transformers knows no masks."""
    texts = TEXTS[-BATCH:]
    near = nearest(pipeline, texts, hard + 1)
    free = [row for row in range(len(pipeline.store)) if row not in near]
    return [Question(f"q{i}", text, ("yes",), (f"p{free[2 * i]}",)) for i, text in enumerate(texts)]


@pytest.mark.parametrize("hard", [0, 1])
def test_loss_equals_sentence_transformers(models, hard):
    """Scale 20, cosine; without and with one hard negative a question, in one micro-batch and in two."""
    pipeline, theirs = models
    questions = labelled_questions(pipeline, hard)
    dataset = Dataset("made", Path("made"), pipeline.store, questions, [], [], sha256="")
    columns = [[q.question for q in questions], [text_of(pipeline, q.positive_ids[0]) for q in questions]]
    for row in range(hard):
        near = nearest(pipeline, columns[0], hard)
        columns.append([pipeline.store[rows[row]].embedder_text for rows in near])
    vectors = [theirs.encode(texts, convert_to_tensor=True, show_progress_bar=False) for texts in columns]
    loss = MultipleNegativesRankingLoss(theirs)
    assert loss.scale == RunConfig().ranking_scale == 20.0
    expected = loss.compute_loss_from_embeddings(vectors, torch.zeros(0)).item()
    assert expected > 0.1
    for accumulation in (1, 2):
        config = RunConfig(
            strategy="embedder",
            ranking_batch_size=BATCH,
            hard_negatives=hard,
            negative_filter="labels",
            gradient_accumulation=accumulation,
        )
        assembler = RankingAssembler(run_of(config, pipeline, dataset))
        batch = assembler.assemble(batch_of(assembler, questions), {}, Ledger()).batch
        batch = jax.tree.map(lambda leaf: leaf[0], batch)  # of the one device
        step = jax.jit(make_eval_step(assembler.objective)(ONE_DEVICE))
        sums = step({"embedder": pipeline.embedder.variables}, {"generator": {}}, batch)
        found = means(jax.device_get(sums))
        print(f"{hard} hard negatives: {found['loss']:.6f}, theirs {expected:.6f}")
        assert found["questions"] == BATCH
        np.testing.assert_allclose(found["loss"], expected, rtol=TOLERANCE)


def text_of(pipeline, identity: str) -> str:
    (row,) = pipeline.store.rows_of([identity])
    return pipeline.store[row].embedder_text
