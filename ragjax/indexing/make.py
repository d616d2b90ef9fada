"""A whole index: vectors in shards, FAISS's index over them, what it finds of what there is, and its record.

Every stage leaves its result in the folder, and the same command goes on after the last one that is there: shard by
shard, then from the trained index, then from the full one. On a folder that is whole it prints what is there.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from ragjax.config import IndexConfig
from ragjax.costs import encoding_flops
from ragjax.data import Dataset, load_dataset
from ragjax.errors import UserError
from ragjax.fields import changed_flags
from ragjax.files import Seal, storing, take_lock
from ragjax.indexing.needs import measure_needs
from ragjax.indexing.recall import measure_recall
from ragjax.parallel import refuse_several_processes
from ragjax.pretrained import Embedder, load_embedder
from ragjax.retrieval import (
    ApproximateIndex,
    Identity,
    IndexRecord,
    Place,
    VectorShards,
    encode_corpus,
    identity_of,
    missing_passages,
    read_index_record,
)
from ragjax.retrieval.encode import forget_changed
from ragjax.retrieval.faiss_index import (
    NPROBE,
    faiss_version,
    lists_of,
    read_index,
    sample_size,
    train_index,
    write_index,
)
from ragjax.retrieval.faiss_index import (
    make_index as make_faiss_index,
)
from ragjax.retrieval.index_folder import INDEX, RECORD, VECTORS, check_made_of, unbroken_seal
from ragjax.retrieval.shards import read_record
from ragjax.version import __version__
from ragjax.voice import progress, say, warn

EXACT = "Flat"  # compares the stored vectors themselves, so that nothing is to be built
_MEND = "choose another --index_dir"


def make_index(config: IndexConfig) -> IndexRecord | None:
    """Makes an index, or what is missing of it, and prints what there is then.

    Returns:
      Its record; None for a dry run.

    Raises:
      UserError: bad input, a folder with another index, too little disk or memory, another process at work on it, or
        one of several processes.
    """
    refuse_several_processes()
    if not config.index_dir:
        raise UserError("--index_dir is needed: name the folder that the index goes into.")
    dataset = load_dataset(config.data)
    embedder = load_embedder(
        config.embedder, config.dtype, query_prefix=config.query_prefix, passage_prefix=config.passage_prefix
    )
    say(f"embedder: {embedder.describe()}\ndata: {dataset.name}, {len(dataset.passages):,} passages", flush=True)
    return index_dataset(config, dataset, embedder)


def index_dataset(config: IndexConfig, dataset: Dataset, embedder: Embedder) -> IndexRecord | None:
    """`make_index` of data and an embedder that are loaded already."""
    making = _Making(config, dataset, embedder)
    if config.dry_run:
        making.check_folder()
        making.say_needs()
        return None
    with _held(making.folder):
        making.check_folder()
        record = making.finish()
    say(describe_index(making.folder, record))
    # What a run needs to be told, too: its embedder and data are those of the index.
    own = {name: getattr(IndexConfig, name) for name in ("index", "nprobe", "train_sample", "vector_dtype", "verify")}
    flags = changed_flags(dataclasses.replace(config, **own), IndexConfig())
    say(f"\nNext:\n  python -m ragjax.train {' '.join(flags)}")
    return record


class _Making:
    """An index in the making."""

    def __init__(self, config: IndexConfig, dataset: Dataset, embedder: Embedder):
        """Raises UserError where the factory string or --nprobe cannot be meant."""
        self.folder = Path(config.index_dir)
        self._config, self._dataset, self._embedder = config, dataset, embedder
        self._identity = identity_of(embedder, dataset.passages, config.vector_dtype)
        empty = make_faiss_index(config.index, embedder.width)  # before anything is encoded
        lists = lists_of(empty)
        if config.nprobe and not lists:
            raise UserError(f"--nprobe={config.nprobe} goes with an index that has lists (IVF...), not {config.index}.")
        self._nprobe = min(config.nprobe, lists)  # 0: the default
        passages = len(dataset.passages)
        asked = config.train_sample or sample_size(empty, passages)
        self._sample = 0 if empty.is_trained else min(asked, passages)
        if self._sample < lists:
            raise UserError(
                f"--index={config.index} has {lists:,} lists, and there are {self._sample:,} vectors to train them on: "
                f"ask for at most {self._sample:,} lists"
                + (", raise --train_sample," if self._sample < passages else "")
                + " or choose --index=Flat."
            )

    def check_folder(self) -> None:
        """Raises UserError, naming what differs, where the folder holds another index or part of one."""
        config, folder = self._config, self.folder
        if (folder / RECORD).is_file():
            record = read_index_record(folder)
            _check_vectors(folder, record.vectors, self._identity)
            asked = {"index": config.index, "train_sample": self._sample}
            made = {"index": record.factory, "train_sample": record.train_sample}
            if self._nprobe:
                asked["nprobe"], made["nprobe"] = self._nprobe, record.nprobe
            for name, value in asked.items():
                if made[name] != value:
                    raise UserError(
                        f"--index_dir={folder} holds an index with --{name}={made[name]} (now {value}): repeat that "
                        f"flag, choose another --index_dir, or remove {RECORD} there to build another index over the "
                        "same vectors."
                    )
        elif begun := read_record(folder / VECTORS):
            _check_vectors(folder, begun[0], self._identity)

    def say_needs(self) -> None:
        """Prints what is still to be done. Raises UserError where disk or memory are not there."""
        record, missing = self._record(), missing_passages(self.folder / VECTORS, self._identity)
        has_index = not missing and (
            self._config.index == EXACT or (record is not None and unbroken_seal(self.folder, record) is not None)
        )
        if has_index:
            return
        factory = "" if self._config.index == EXACT else self._config.index
        needs = measure_needs(
            self.folder, self._embedder, self._dataset.passages, self._identity, missing, factory, self._sample
        )
        say(f"left to do: {needs.describe()}", flush=True)
        needs.check(self.folder)

    def _record(self) -> IndexRecord | None:
        return read_index_record(self.folder) if (self.folder / RECORD).is_file() else None

    def finish(self) -> IndexRecord:
        """Does what is missing."""
        if self._config.verify:
            self._forget_changed()
        self.say_needs()
        vectors = encode_corpus(
            self._embedder, self._dataset.passages, Place(self.folder / VECTORS, _MEND), self._identity
        )
        record = self._record()
        if record is None or not self._is_whole(record, vectors):
            if record is not None:
                warn(f"the index in {self.folder} is not that of its vectors any more, or damaged: building it again")
            record = self._build(vectors)
            record.write(self.folder)
            for path in self.folder.glob("trained-*"):
                path.unlink()
        if not record.recall:
            record = dataclasses.replace(record, recall=self._recall(vectors, record))
            record.write(self.folder)
        return record

    def _forget_changed(self) -> None:
        """Hashes every file; one that was changed counts as missing."""
        forget_changed(self.folder / VECTORS)
        record = self._record()
        if record is not None and unbroken_seal(self.folder, record, verify=True) is None:
            (self.folder / INDEX).unlink(missing_ok=True)
        say(f"verified: every file of {self.folder} was hashed, and what is not as it was written is made again.")

    def _is_whole(self, record: IndexRecord, vectors: VectorShards) -> bool:
        if record.vectors_sha256 != vectors.sha256:
            return False
        return record.seal is None or unbroken_seal(self.folder, record) is not None

    def _build(self, vectors: VectorShards) -> IndexRecord:
        """Writes index.faiss, where one is needed, and says what it is."""
        began, seal = time.perf_counter(), None
        index = make_faiss_index(self._config.index, self._embedder.width)
        if self._config.index != EXACT:
            index = self._trained(index, vectors)
            with progress(desc="indexing", total=len(vectors), unit=" passages") as bar:
                for block in vectors.blocks():
                    index.add(np.ascontiguousarray(block))
                    bar.update(len(block))
            with storing("the index", self.folder / INDEX, _MEND):
                write_index(index, self.folder / INDEX)
            seal = Seal.of(self.folder / INDEX)
        else:
            (self.folder / INDEX).unlink(missing_ok=True)  # of another one, before
        return IndexRecord(
            vectors=self._identity,
            vectors_sha256=vectors.sha256,
            embedder=self._embedder.describe(),
            corpus=self._dataset.name,
            factory=self._config.index,
            nprobe=self._nprobe or min(NPROBE, lists_of(index)),
            train_sample=self._sample,
            seal=seal,
            recall={"from": "all vectors are compared"} if seal is None else {},
            cost=self._cost(vectors, time.perf_counter() - began),
            versions={"ragjax": __version__, "faiss": faiss_version(), "numpy": np.__version__},
        )

    def _trained(self, index: Any, vectors: VectorShards) -> Any:
        """The index, trained: kept in a file, since that takes hours where there are many lists."""
        if not self._sample:
            return index
        key = json.dumps([self._config.index, self._sample, vectors.sha256])
        path = self.folder / f"trained-{hashlib.sha256(key.encode()).hexdigest()[:16]}.faiss"
        if path.exists():
            with contextlib.suppress(UserError):  # damaged: train again
                return read_index(path, in_memory=True)
        rows = np.random.default_rng(0).choice(len(vectors), self._sample, replace=False, shuffle=False)
        say(f"training {self._config.index} on {self._sample:,} vectors", flush=True)
        train_index(index, self._config.index, vectors.vectors_of(np.sort(rows)))
        with storing("the trained index", path, _MEND):
            write_index(index, path)
        return index

    def _recall(self, vectors: VectorShards, record: IndexRecord) -> dict[str, Any]:
        index = ApproximateIndex(read_index(self.folder / INDEX), record.factory, vectors, record.nprobe)
        return measure_recall(self._embedder, self._dataset, vectors, index)

    def _cost(self, vectors: VectorShards, index_seconds: float) -> dict[str, Any]:
        flops = encoding_flops(self._embedder.size, len(vectors), vectors.tokens)
        encoding = {"seconds": vectors.seconds, "tokens": vectors.tokens, "flops": flops}
        return {"encode": encoding, "index_seconds": index_seconds}


def _check_vectors(folder: Path, made: Identity, asked: Identity) -> None:
    """`check_made_of`, and how they are computed and stored."""
    check_made_of(folder, made, asked)
    flags = {"dtype": (made.embedder["dtype"], asked.embedder["dtype"]), "vector_dtype": (made.dtype, asked.dtype)}
    for name, (before, now) in flags.items():
        if before != now:
            raise UserError(
                f"--index_dir={folder} holds vectors with --{name}={before} (now {now}): repeat that flag or choose "
                "another --index_dir."
            )


@contextlib.contextmanager
def _held(folder: Path) -> Generator[None, None, None]:
    """Makes the folder and holds it for this process. Raises UserError where another process has it."""
    with storing("the index", folder, _MEND):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    with lock:
        take_lock(lock.fileno(), f"Another process is working on {folder}: wait for it or choose another --index_dir.")
        yield


def describe_index(folder: Path, record: IndexRecord) -> str:
    """What there is, for people."""
    made = record.vectors
    size, seconds = made.count * made.bytes_of_passage, record.cost["encode"]["seconds"]
    lines = [
        f"\n{folder}: {record.factory} over {made.count:,} passages of {record.corpus}, by {record.embedder}",
        f"  vectors   {made.width} x {made.dtype}, {size / 1e9:.3g} GB, encoded in {seconds:,.0f} s",
    ]
    if record.seal:
        lines.append(f"  index     {record.seal.bytes / 1e9:.3g} GB, built in {record.cost['index_seconds']:,.0f} s")
    for line in record.recall.get("measured", ()):
        probes = f" with --nprobe={line['nprobe']}" if line["nprobe"] else ""
        mark = ", which is its default" if line["nprobe"] == record.nprobe and record.nprobe else ""
        lines.append(
            f"  recall    {line['recall_at_5']:.3f} of the 5 nearest, {line['recall_at_10']:.3f} of the 10, "
            f"{line['questions_per_second']:,.0f} questions/s{probes}{mark}"
        )
    if record.seal:
        lines.append(f"            ({record.recall['questions']:,} {record.recall['from']})")
    return "\n".join(lines)
