"""What the tests of retrieval share."""

import numpy as np

from ragjax.retrieval import ArrayVectors, Index, Queries, Retrieval, Retriever, VectorStore


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random float32 vectors of length 1."""
    vectors = rng.normal(size=shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def brute_force(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores [B, k] by a full sort of the float64 products, equal float32 scores by row."""
    scores = np.array([[np.float32(np.dot(v, q)) for v in vectors.astype(float)] for q in queries.astype(float)])
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(scores, rows, axis=1)


def queries_of(vectors: np.ndarray) -> Queries:
    """Questions of these vectors, each with a text of its own."""
    return Queries([f"question {place}" for place in range(len(vectors))], vectors)


def retrieve(index: Index, vectors: np.ndarray, asked: np.ndarray, k: int) -> Retrieval:
    """What a retriever over the index answers to questions of the vectors `asked`."""
    return Retriever(index, ArrayVectors(vectors)).retrieve(queries_of(asked), k)


def all_of(vectors: VectorStore) -> np.ndarray:
    """[P, E], all that a store holds."""
    return np.concatenate(list(vectors.blocks()))
