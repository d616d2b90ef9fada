"""How much of what exact search finds an approximate index finds too."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ragjax.data import Dataset
from ragjax.data.passages import PassageStore
from ragjax.pretrained import Embedder
from ragjax.retrieval import ApproximateIndex, ExactIndex, Queries, Retriever, VectorStore

_QUESTIONS = 1000  # at most
_DEPTHS = (5, 10)
_NPROBES = (1, 4, 16, 64)  # tried besides the index's own
_WORDS = 12  # of a passage without title that stand for a question


def held_out_questions(dataset: Dataset) -> tuple[str, list[str]]:
    """(where they come from, texts that no index was trained on): dev questions, or where there are none what passages
    are called.
    """
    if dataset.dev:
        return "dev questions", [question.question for question in dataset.dev[:_QUESTIONS]]
    return "titles of passages", titles(dataset.passages)


def titles(store: PassageStore) -> list[str]:
    """Of passages that are spread over the corpus; the first words of those that have none."""
    stride = -(-len(store) // _QUESTIONS)
    passages = [store[row] for row in range(0, len(store), stride)]
    return [passage.title or " ".join(passage.text.split()[:_WORDS]) for passage in passages]


def measure_recall(
    embedder: Embedder, dataset: Dataset, vectors: VectorStore, index: ApproximateIndex
) -> dict[str, Any]:
    """{"questions", "from", "measured": [{"nprobe", "recall_at_5", "recall_at_10", "questions_per_second"}]}.

    A recall is the mean share of the k passages nearest to a question that a run with this index gets. nprobe is None
    where the index has no lists. The index is left as it was.
    """
    source, texts = held_out_questions(dataset)
    queries = Queries(texts, embedder.encode_queries(texts))
    depth = min(max(_DEPTHS), len(vectors))
    nearest = Retriever(ExactIndex(vectors), vectors).retrieve(queries, depth).passage_rows
    own, measured = index.nprobe, []
    for nprobe in sorted({own, *(n for n in _NPROBES if n <= index.lists)}) if index.lists else [0]:
        index.nprobe = nprobe
        began = time.perf_counter()
        found = Retriever(index, vectors).retrieve(queries, depth).passage_rows
        line: dict[str, Any] = {"nprobe": nprobe or None}
        line |= {f"recall_at_{k}": _shared(found, nearest, min(k, depth)) for k in _DEPTHS}
        measured.append({**line, "questions_per_second": len(texts) / (time.perf_counter() - began)})
    index.nprobe = own
    return {"questions": len(texts), "from": source, "measured": measured}


def _shared(found: np.ndarray, nearest: np.ndarray, k: int) -> float:
    """Mean share of the k nearest that are among the k found."""
    pairs: Sequence[tuple[np.ndarray, np.ndarray]] = list(zip(found[:, :k], nearest[:, :k], strict=True))
    return float(np.mean([len(np.intersect1d(one, other)) / k for one, other in pairs]))
