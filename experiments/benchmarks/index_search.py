"""Indexes over random unit vectors: what building takes, how fast they answer, how much of the nearest they find.

    python experiments/benchmarks/index_search.py --passages=1000000 --out=experiments/results/index_search.json

Each index is built in a process of its own, from vectors in shards, and searched in another, so that neither's memory
is the other's. Questions are vectors of the corpus with noise, and those vectors are not counted among what is found.
Random vectors are the hardest case for lists and graphs: no passage has near neighbours. The memory of a search is what
the process holds more than before it opened the index: "resident" with the pages of mapped files, which the system
takes back when it needs them, after FEW questions and after all; "anonymous" without.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance

from ragjax.files import Seal, write_json
from ragjax.retrieval import (
    ApproximateIndex,
    DeviceIndex,
    ExactIndex,
    Identity,
    Index,
    Queries,
    Retriever,
    VectorShards,
)
from ragjax.retrieval.faiss_index import make_index, read_index, sample_size, train_index, write_index
from ragjax.retrieval.shards import ROWS, Shard, file_name
from ragjax.retrieval.vectors import longest_of

K, NOISE = 5, 0.5
DEVICE = "device:"
BATCHES = (1, 256)
FEW = 16
SECONDS = 3.0  # of searching, for each batch size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument(
        "--indexes",
        default="Flat;IVF1024,Flat;HNSW32;IVF1024,PQ48;device:float32;device:int8",
        help="separated by semicolons: FAISS factory strings, and how devices hold the vectors",
    )
    parser.add_argument("--nprobe", default="8,32,128", help="of those with lists, separated by commas")
    parser.add_argument("--folder", type=Path, help="for vectors and indexes; left out: a temporary one")
    parser.add_argument("--out", type=Path, help="JSON file")
    flags = parser.parse_args()
    result: dict[str, Any] = {
        **provenance("faiss-cpu", "numpy"),
        "passages": flags.passages,
        "width": flags.width,
        "questions": flags.questions,
        "measured": [],
    }
    with tempfile.TemporaryDirectory(dir=flags.folder) as name:
        folder = Path(name)
        alone(write_vectors, folder, flags.passages, flags.width, flags.questions)
        for factory in flags.indexes.split(";"):
            built = alone(build, folder, factory)
            for nprobe in map(int, flags.nprobe.split(",")) if "IVF" in factory else [0]:
                line = {"index": factory, "nprobe": nprobe or None, **built, **alone(search, folder, factory, nprobe)}
                result["measured"].append(line)
                print(json.dumps(line), flush=True)
                if flags.out:
                    write_json(flags.out, result)


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def write_vectors(folder: Path, passages: int, width: int, questions: int) -> None:
    """Random unit vectors in shards; questions, and the nearest passages to them."""
    rng, shards = np.random.default_rng(0), []
    identity = Identity("random", {}, passages, width, "float32", ROWS)
    for number in range(identity.shards):
        vectors = unit(rng, len(identity.rows_of(number)), width)
        np.save(folder / file_name(number), vectors)
        shards.append(Shard(Seal.of(folder / file_name(number)), 0.0, 0, longest_of(vectors)))
    record = {"identity": identity.as_json(), "shards": [shard.as_json() for shard in shards]}
    write_json(folder / "vectors.json", record)
    rows = rng.choice(passages, questions, replace=False)
    stored = stored_vectors(folder)
    asked = stored.vectors_of(rows) + NOISE * unit(rng, questions, width)
    np.save(folder / "asked.npy", (asked / np.linalg.norm(asked, axis=1, keepdims=True)).astype(np.float32))
    np.save(folder / "own.npy", rows)
    np.save(folder / "nearest.npy", without_own(folder, retrieve(ExactIndex(stored), stored, folder)))


def unit(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    vectors = rng.standard_normal((count, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def stored_vectors(folder: Path) -> VectorShards:
    record = json.loads((folder / "vectors.json").read_text())
    return VectorShards(folder, Identity.read(record["identity"]), [Shard.read(shard) for shard in record["shards"]])


def build(folder: Path, factory: str) -> dict[str, Any]:
    """Writes the index and says what that took. Exact search, on the host and on devices, needs none."""
    vectors, began, before = stored_vectors(folder), time.perf_counter(), memory()
    if factory == "Flat" or factory.startswith(DEVICE):
        bytes_of_number = np.dtype(factory.removeprefix(DEVICE) if factory != "Flat" else "float32").itemsize
        size = bytes_of_number * len(vectors) * vectors.width
        return {"train_s": 0.0, "add_s": 0.0, "bytes": size, "build_anonymous": 0}
    index = make_index(factory, vectors.width)
    if count := sample_size(index, len(vectors)):
        rows = np.random.default_rng(0).choice(len(vectors), count, replace=False, shuffle=False)
        train_index(index, factory, vectors.vectors_of(np.sort(rows)))
    trained = time.perf_counter()
    for block in vectors.blocks():
        index.add(np.ascontiguousarray(block))
    added, held = time.perf_counter(), memory()["anonymous"] - before["anonymous"]
    write_index(index, folder / "index.faiss")
    size = (folder / "index.faiss").stat().st_size
    return {"train_s": trained - began, "add_s": added - trained, "bytes": size, "build_anonymous": held}


def open_index(folder: Path, factory: str, nprobe: int, vectors: VectorShards) -> Index:
    """The index as runs search it."""
    if factory.startswith(DEVICE):
        return DeviceIndex(vectors, factory.removeprefix(DEVICE))
    if factory == "Flat":
        return ExactIndex(vectors)
    return ApproximateIndex(read_index(folder / "index.faiss"), factory, vectors, nprobe)


def search(folder: Path, factory: str, nprobe: int) -> dict[str, Any]:
    """Memory, recall and questions a second of one index, rescoring included."""
    before, vectors = memory(), stored_vectors(folder)
    index = open_index(folder, factory, nprobe, vectors)
    opened, asked = memory(), np.load(folder / "asked.npy")[:FEW]
    Retriever(index, vectors).retrieve(Queries([""] * len(asked), asked), K)
    few = memory()
    found = without_own(folder, retrieve(index, vectors, folder))
    after, nearest = memory(), np.load(folder / "nearest.npy")
    shared = [len(set(a) & set(b)) / K for a, b in zip(found.tolist(), nearest.tolist(), strict=True)]
    return {
        f"recall_at_{K}": float(np.mean(shared)),
        **{f"questions_per_s_{size}": rate(index, vectors, folder, size) for size in BATCHES},
        "opened_resident": opened["resident"] - before["resident"],
        f"searched_{FEW}_resident": few["resident"] - before["resident"],
        "searched_resident": after["resident"] - before["resident"],
        "searched_anonymous": after["anonymous"] - before["anonymous"],
    }


def retrieve(index: Index, vectors: VectorShards, folder: Path) -> np.ndarray:
    """Passage rows [questions, K + 1] of all questions."""
    asked = np.load(folder / "asked.npy")
    return Retriever(index, vectors).retrieve(Queries([""] * len(asked), asked), K + 1).passage_rows


def without_own(folder: Path, rows: np.ndarray) -> np.ndarray:
    """The K best that are not the vector that a question was made of."""
    own = np.load(folder / "own.npy")
    return np.array([[row for row in found if row != mine][:K] for found, mine in zip(rows, own, strict=True)])


def rate(index: Index, vectors: VectorShards, folder: Path, size: int) -> float:
    """Questions a second in batches of `size`."""
    asked, retriever = np.load(folder / "asked.npy"), Retriever(index, vectors)
    batches = [asked[start : start + size] for start in range(0, len(asked), size)]
    retriever.retrieve(Queries([""] * len(batches[0]), batches[0]), K)
    began, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < SECONDS or not done:
        batch = batches[done // size % len(batches)]
        retriever.retrieve(Queries([""] * len(batch), batch), K)
        done += len(batch)
    return done / spent if spent else 0.0


def memory() -> dict[str, int]:
    """Bytes that this process holds (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.strip()}
    return {"resident": 1024 * int(found["VmRSS"]), "anonymous": 1024 * int(found["RssAnon"])}


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda for a GPU
    main()
