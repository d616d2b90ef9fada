"""Exact inner-product search over the passage vectors. The only file that imports FAISS.

FAISS adds up in float32, in an order that depends on the number of queries, so that its scores differ in the
last bits and passages of equal text may come in any order. Here FAISS proposes, and the candidates are scored
again in float64: the result does not depend on how queries are batched, and among equal scores the lower row
comes first. FAISS is imported where it is used: what needs no index runs where there is no FAISS.
"""

import numpy as np

from ragjax.errors import DivergedError, UserError

_SPARE = 8  # candidates beyond k that are asked for at first


class ExactIndex:
    """All inner products of queries with P vectors of width E. Ids are row numbers (int64)."""

    def __init__(self, vectors: np.ndarray):
        """vectors: [P, E] float32, P >= 1; they are copied (a memory map may be closed afterwards).

        Raises ValueError for another shape or type.
        """
        if vectors.ndim != 2 or 0 in vectors.shape or vectors.dtype != np.float32:
            raise ValueError(f"vectors must be float32 [P, E], not {vectors.dtype} {list(vectors.shape)}")
        import faiss

        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)  # in one piece: FAISS would double its storage on the way
        # FAISS's own storage seen as an array: one copy in memory serves search and lookup.
        self._vectors = faiss.rev_swig_ptr(self._index.get_xb(), vectors.size).reshape(vectors.shape)
        longest = float(np.sqrt(np.einsum("pe,pe->p", self._vectors, self._vectors).max()))
        # Bound of |float32 score - exact score| / |query|: one unit of rounding per addend, and one for the
        # result.
        self._rounding = (vectors.shape[1] + 1) * 2.0**-24 * longest

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best passages of each query: (ids [B, k] int64, scores [B, k] float32), best first.

        queries: [B, E]. Scores are inner products; of equal scores the lower id comes first, at the k-th
        place too. Raises UserError if k is not in 1..P or a query is not finite, ValueError for another
        shape.
        """
        count, width = self._vectors.shape
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != width:
            raise ValueError(f"queries must be [B, {width}], not {list(queries.shape)}")
        if not 1 <= k <= count:
            raise UserError(f"--top_k={k} does not fit a corpus of {count} passages: choose 1 to {count}")
        if not np.isfinite(queries).all():
            raise DivergedError("a question vector is not finite: the embedder has diverged, lower --embedder_lr")
        ids = np.empty((len(queries), k), np.int64)
        scores = np.empty((len(queries), k), np.float32)
        open_rows, asked = np.arange(len(queries)), min(k + _SPARE, count)
        while len(open_rows):
            proposed_scores, proposed_ids = self._index.search(queries[open_rows], asked)
            unsettled = []
            for row, candidates, last in zip(open_rows, proposed_ids, proposed_scores[:, -1], strict=True):
                ids[row], exact = self._best(queries[row], candidates, k)
                scores[row] = exact
                # Nothing outside the candidates scores above `last` plus rounding: can it reach the k-th
                # place?
                slack = 2 * self._rounding * float(np.linalg.norm(queries[row]))
                if asked < count and exact[-1] <= last + slack:
                    unsettled.append(row)
            open_rows, asked = np.array(unsettled, np.int64), min(4 * asked, count)
        return ids, scores

    def _best(self, query: np.ndarray, candidates: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best of the candidates: ids [k] and float32 scores [k]."""
        # An elementwise product and a sum along the row: equal rows get equal sums, which a BLAS product of a
        # matrix does not promise. Rounded to float32 before the order is taken, so that the order is that of
        # the scores shown.
        products = self._vectors[candidates].astype(np.float64) * query
        exact = products.sum(axis=1).astype(np.float32)
        order = np.lexsort((candidates, -exact))[:k]
        return candidates[order], exact[order]

    def vectors_of(self, ids: np.ndarray) -> np.ndarray:
        """Stored vectors of the ids: [..] int -> [.., E] float32, a copy. Raises IndexError for an id outside
        0..P-1.
        """
        ids = np.asarray(ids)
        if ids.size and ids.min() < 0:  # would count from the end
            raise IndexError("passage ids start at 0")
        return self._vectors[ids]

    def describe(self) -> dict:
        """What a run records of its index: type, FAISS version, passages P, width E, bytes of the vectors in
        memory.
        """
        import faiss

        passages, width = self._vectors.shape
        return {
            "type": "IndexFlatIP",
            "faiss": faiss.__version__,
            "passages": passages,
            "width": width,
            "bytes": self._vectors.nbytes,
        }
