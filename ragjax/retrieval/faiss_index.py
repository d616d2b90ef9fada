"""Search by FAISS, exact and approximate. The only file that imports it.

In `ExactIndex` FAISS proposes, and `exact.py` settles what rounding leaves open. What an `ApproximateIndex` proposes
may depend on the batch in rare ties. FAISS is imported where it is used: what needs no index runs where there is no
FAISS.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from ragjax.costs import Cost
from ragjax.errors import UserError, reason
from ragjax.files import sync
from ragjax.retrieval.exact import exact_rows
from ragjax.retrieval.retriever import Proposal, Queries
from ragjax.retrieval.vectors import VectorStore, as_store

# Candidates that an approximate search proposes: so many times k, and at least so many. The stored vectors then decide,
# which mends most of what codes of a few bits have put into the wrong order.
_TIMES, _LEAST = 4, 32
# Lists that a question is looked up in, where nobody says how many.
NPROBE = 32
# Training vectors for each list (FAISS uses at most 256 and warns below 39), and at least so many.
_PER_LIST, _FEWEST = 64, 65_536


class ExactIndex:
    """All inner products of queries with P vectors of width E, which stay where they are."""

    def __init__(self, vectors: np.ndarray | VectorStore):
        """vectors: a store, or an array [P, E] float32, P >= 1, which is kept without a copy. Each search reads them
        anew.

        Raises ValueError for an array of another shape or type.
        """
        self._vectors = as_store(vectors)

    def search(self, queries: Queries, k: int) -> Proposal:
        """The k best passage rows of each query [B, k], best first; of equal scores the lower row comes first, also at
        the k-th place.
        """
        began = time.perf_counter()
        passage_rows = exact_rows(self._nearest, queries.vectors, self._vectors, k)
        flops = 2.0 * len(queries.vectors) * len(self._vectors) * self._vectors.width
        return Proposal(passage_rows, Cost(time.perf_counter() - began, flops))

    def _nearest(
        self, queries: Float32[np.ndarray, "B E"], asked: int
    ) -> tuple[Float32[np.ndarray, "B n"], Int64[np.ndarray, "B n"]]:
        """(scores, passage rows) of the `asked` best by FAISS's scores, best first, block by block of the vectors."""
        import faiss

        scores = np.empty((len(queries), 0), np.float32)
        rows = np.empty((len(queries), 0), np.int64)
        start = 0
        for block in self._vectors.blocks():
            found, places = faiss.knn(
                queries, np.asarray(block), min(asked, len(block)), metric=faiss.METRIC_INNER_PRODUCT
            )
            scores, rows = np.concatenate([scores, found], 1), np.concatenate([rows, places + start], 1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :asked]
            scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
            start += len(block)
        return scores, rows

    def describe(self) -> dict[str, Any]:
        """What a run records of its index: type, FAISS version, passages P, width E, bytes of P float32 vectors."""
        passages, width = len(self._vectors), self._vectors.width
        return {
            "type": "Flat",
            "faiss": faiss_version(),
            "passages": passages,
            "width": width,
            "bytes": 4 * passages * width,
        }


class ApproximateIndex:
    """What a FAISS factory string makes: it looks at a part of the vectors, or at codes in their place."""

    def __init__(self, index: Any, factory: str, vectors: VectorStore, nprobe: int = 0):
        """index: FAISS's own, of the P vectors in order.  nprobe: lists that a question is looked up in; 0: `NPROBE`.

        Raises UserError where nprobe is given for an index without lists.
        """
        self._index, self._factory, self._vectors = index, factory, vectors
        self._exact = ExactIndex(vectors)
        self.lists = lists_of(index)  # 0: it has none
        if nprobe and not self.lists:
            raise UserError(f"--nprobe={nprobe} goes with an index that has lists (IVF...), not with {factory}.")
        self.nprobe = min(nprobe or NPROBE, self.lists)

    def search(self, queries: Queries, k: int) -> Proposal:
        """At least k passage rows of each query [B, n], no row twice.

        A query whose lists hold too few is looked up in more of them, and at last among all vectors.
        """
        began = time.perf_counter()
        asked = min(max(_TIMES * k, _LEAST), len(self._vectors))
        passage_rows = np.full((len(queries.vectors), asked), -1, np.int64)
        open_places, nprobe, flops = np.arange(len(passage_rows)), self.nprobe, 0.0
        while len(open_places):
            found, spent = self._found(queries.vectors[open_places], asked, nprobe)
            flops += spent
            full = (found >= 0).all(axis=1)
            passage_rows[open_places[full]] = found[full]
            open_places = open_places[~full]
            if nprobe >= self.lists:
                break
            nprobe = min(4 * nprobe, self.lists)
        if len(open_places):
            texts = [queries.texts[place] for place in open_places]
            exact = self._exact.search(Queries(texts, queries.vectors[open_places]), asked)
            passage_rows[open_places] = exact.passage_rows
            flops += exact.cost.flops
        return Proposal(passage_rows, Cost(time.perf_counter() - began, flops))

    def _found(self, vectors: Float32[np.ndarray, "B E"], asked: int, nprobe: int) -> tuple[np.ndarray, float]:
        """(passage rows [B, asked], -1 where nothing was found; FLOPs, a code counted as its vector)."""
        import faiss

        counts: Any = faiss.cvar  # of vectors that FAISS compares
        counts.indexIVF_stats.reset()
        counts.hnsw_stats.reset()
        if self.lists:
            faiss.ParameterSpace().set_index_parameter(self._index, "nprobe", nprobe)
        _, rows = self._index.search(np.ascontiguousarray(vectors), asked)
        if self.lists:
            compared = counts.indexIVF_stats.ndis + self.lists * len(vectors)
        else:
            compared = counts.hnsw_stats.ndis or len(self._vectors) * len(vectors)
        return rows, 2.0 * compared * self._vectors.width

    def describe(self) -> dict[str, Any]:
        """What a run records of its index: the factory, what it looks at, FAISS version, passages P, width E."""
        return {
            "type": self._factory,
            **({"nprobe": self.nprobe, "lists": self.lists} if self.lists else {}),
            "faiss": faiss_version(),
            "passages": len(self._vectors),
            "width": self._vectors.width,
        }


def faiss_version() -> str:
    import faiss

    return faiss.__version__


# ---- building ----------------------------------------------------------------------------------------------


def make_index(factory: str, width: int) -> Any:
    """An empty FAISS index over inner products. Raises UserError where FAISS cannot make one of this factory string."""
    import faiss

    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(
            f"--index={factory} is nothing that FAISS makes over inner products of width {width} ({_fault(error)}): "
            "write a factory string such as Flat, IVF4096,Flat, IVF65536,PQ64 or HNSW32."
        ) from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT or isinstance(index, faiss.IndexIDMap):
        raise UserError(f"--index={factory} does not search P vectors by inner product: choose another factory string.")
    return index


def lists_of(index: Any) -> int:
    """How many lists an IVF index has; 0: another kind."""
    import faiss

    ivf = faiss.try_extract_index_ivf(index)
    return 0 if ivf is None else ivf.nlist


def sample_size(index: Any, passages: int) -> int:
    """Vectors to train on, where nobody says how many; 0: it needs none."""
    return 0 if index.is_trained else min(max(_PER_LIST * lists_of(index), _FEWEST), passages)


def train_index(index: Any, factory: str, sample: Float32[np.ndarray, "n E"]) -> None:
    """Raises UserError where the vectors are too few for the factory string."""
    try:
        index.train(np.ascontiguousarray(sample))
    except RuntimeError as error:
        raise UserError(
            f"--index={factory} cannot be trained on {len(sample):,} vectors ({_fault(error)}): ask for fewer lists or "
            "a higher --train_sample, or choose --index=Flat."
        ) from error


def write_index(index: Any, path: Path) -> None:
    """Writes a FAISS index: under its name stands either nothing or the whole of it. Raises OSError."""
    import faiss

    part = path.with_name(path.name + ".part")
    try:
        faiss.write_index(index, str(part))
        sync(part)
        os.replace(part, path)
    except RuntimeError as error:  # a full disk, for one
        raise OSError(None, _fault(error)) from error
    finally:
        part.unlink(missing_ok=True)


def read_index(path: Path, in_memory: bool = False) -> Any:
    """A FAISS index from its file, which stays on disk where its kind can be searched there.

    in_memory: read it whole, so that it can be added to. Raises UserError where it cannot be read.
    """
    import faiss

    flags = 0 if in_memory else faiss.IO_FLAG_MMAP_IFC  # also maps lists, which IO_FLAG_MMAP alone does
    try:
        return faiss.read_index(str(path), flags)
    except RuntimeError as error:
        raise UserError(f"{path} is no index that FAISS reads ({_fault(error)}): build it again") from error


def _fault(error: RuntimeError) -> str:
    """What FAISS says went wrong, without where in its source."""
    return reason(error).rpartition("Error: ")[2]


# ---- what building takes -----------------------------------------------------------------------------------

# What FAISS does by default: rounds of k-means over lists and over codes, rounds of OPQ with k-means inside, and the
# vectors that those look at; centroids of a code; vectors compared on the way through a graph of lists.
_ROUNDS, _CODE_ROUNDS, _OPQ_ROUNDS, _OPQ_CODE_ROUNDS, _CODE_SAMPLE, _CODES, _VISITED = 10, 25, 50, 4, 65_536, 256, 512
_TRIED = 1000


def expected_bytes(factory: str, width: int, passages: int) -> int:
    """About the size of an index of P passages, in memory as on disk."""
    import faiss

    index = make_index(factory, width)
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        return passages * (ivf.code_size + 8) + 4 * ivf.nlist * ivf.d
    core = _core(index)
    if isinstance(core, faiss.IndexHNSW):  # neighbours, the vector's level and where its neighbours begin
        storage = faiss.downcast_index(core.storage).sa_code_size()
        return passages * (storage + 4 * core.hnsw.nb_neighbors(0) + 16)
    try:
        return passages * index.sa_code_size()
    except RuntimeError:  # a kind that does not tell
        return passages * 4 * width


def expected_seconds(factory: str, width: int, passages: int, sample: int) -> float:
    """About how long training and filling an index take here, from some tenths of a second of FAISS's own work."""
    import faiss

    index = make_index(factory, width)
    lists, core, compared = lists_of(index), _core(index), 0
    if lists:
        compared += _ROUNDS * sample * lists + passages * (min(lists, _VISITED) if "_HNSW" in factory else lists)
    if "PQ" in factory:
        coded = min(sample, _CODE_SAMPLE)
        compared += (passages + _CODE_ROUNDS * coded) * _CODES
        if "OPQ" in factory:
            compared += _OPQ_ROUNDS * coded * (_OPQ_CODE_ROUNDS * _CODES + 2 * width)
    rng = np.random.default_rng(0)
    tried = rng.standard_normal((4 * _TRIED, width), dtype=np.float32)
    began = time.perf_counter()
    faiss.knn(tried[:_TRIED], tried, 1, metric=faiss.METRIC_INNER_PRODUCT)
    seconds = (time.perf_counter() - began) * compared / (4 * _TRIED**2)
    if isinstance(core, faiss.IndexHNSW):
        graph = faiss.IndexHNSWFlat(width, core.hnsw.nb_neighbors(1), faiss.METRIC_INNER_PRODUCT)
        began = time.perf_counter()
        graph.add(tried[:_TRIED])
        each = (time.perf_counter() - began) / _TRIED
        seconds += passages * each * max(np.log(passages) / np.log(_TRIED), 1.0)  # paths grow with the graph
    return float(seconds)


def _core(index: Any) -> Any:
    """The index behind a transformation of the vectors."""
    import faiss

    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
