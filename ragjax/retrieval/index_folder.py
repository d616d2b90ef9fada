"""The folder of an index, which several runs share.

    INDEX/index.json       what it was made of and how, its recall, what it has cost; written last
    INDEX/index.faiss      FAISS's index; none where every vector is compared (--index=Flat)
    INDEX/vectors/         the passages' vectors in shards (`ragjax.retrieval.shards`)
    INDEX/trained-*.faiss  while it is being built: the index before its first vector
    INDEX/.lock            held by the one process that builds

Passages are not kept here: an index goes with the data that it was made of, and says so where they are others.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ragjax.errors import UserError, reason
from ragjax.files import Seal, read_json_object, write_json
from ragjax.retrieval.encode import open_vectors
from ragjax.retrieval.faiss_index import ApproximateIndex, ExactIndex, read_index
from ragjax.retrieval.retriever import Index
from ragjax.retrieval.shards import Identity, VectorShards

RECORD, INDEX, VECTORS = "index.json", "index.faiss", "vectors"
_BUILD = "run python -m ragjax.index with this --index_dir"
# What of an embedder shapes its vectors: their names in sentences. Its dtype may differ from one use to the next.
_PARTS = {
    "sha256": "another embedder",
    "weights": "other weights of the embedder",
    "max_seq_length": "another longest input",
    "passage_prefix": "another --passage_prefix",
}


@dataclasses.dataclass(frozen=True)
class IndexRecord:
    """What index.json says."""

    vectors: Identity  # what the vectors were made of: corpus, embedder, number, width
    vectors_sha256: str
    embedder: str  # in words
    corpus: str  # the data set's name
    factory: str
    nprobe: int  # 0: an index without lists
    train_sample: int
    seal: Seal | None  # of index.faiss; None: exact search, which needs no file
    recall: Mapping[str, Any]
    cost: Mapping[str, Any]
    versions: Mapping[str, str]
    metric: str = "inner_product"

    def as_json(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "vectors": self.vectors.as_json(), "seal": self.seal and self.seal.as_json()}

    @property
    def sha256(self) -> str:
        """Of all that decides what is found."""
        parts = [self.vectors.key, self.vectors_sha256, self.factory, self.nprobe, self.seal and self.seal.sha256]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Raises UserError where it cannot be written."""
        write_json(folder / RECORD, self.as_json())


def read_index_record(folder: Path) -> IndexRecord:
    """What the folder's index is. Raises UserError where there is none, or its record is damaged."""
    if not (folder / RECORD).is_file():
        state = "is not finished" if (folder / VECTORS).is_dir() else "holds no index"
        raise UserError(f"--index_dir={folder} {state}: {_BUILD}.")
    value = read_json_object(folder / RECORD)
    try:
        seal = value["seal"] and Seal.read(value["seal"])
        fields: dict[str, Any] = {field.name: value[field.name] for field in dataclasses.fields(IndexRecord)}
        fields |= {"vectors": Identity.read(value["vectors"]), "seal": seal}
        return IndexRecord(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / RECORD} does not describe an index of this version ({reason(error)}): {_BUILD}, or build it in "
            "a new one."
        ) from error


def check_made_of(folder: Path, made: Identity, asked: Identity) -> None:
    """Raises UserError, naming what differs, where the folder's vectors are not those of a corpus and an embedder."""
    found, wanted = made.embedder, asked.embedder
    for name, words in _PARTS.items():
        if found.get(name) != wanted.get(name):
            before, now = (str(each.get(name))[:12] for each in (found, wanted))
            raise UserError(
                f"--index_dir={folder} was made with {words} ({name} {before!r}, now {now!r}): give what it was made "
                "with, or another --index_dir."
            )
    if made.texts != asked.texts:
        raise UserError(
            f"--index_dir={folder} was made of other passages ({made.count:,} of sha256 {made.texts[:12]}, now "
            f"{asked.count:,} of {asked.texts[:12]}): give the --data that it was made of, or another --index_dir."
        )


def open_index(folder: Path, asked: Identity, nprobe: int = 0) -> tuple[VectorShards, Index]:
    """An index that `ragjax.index` has built, and the vectors that it is of.

    Args:
      folder: where it stands.
      asked: the corpus and the embedder that it is wanted for.
      nprobe: lists that a question is looked up in; 0: as it was built for.

    Raises:
      UserError: there is none, it is not finished or damaged, or was made of something else.
    """
    record = read_index_record(folder)
    check_made_of(folder, record.vectors, asked)
    vectors = open_vectors(folder / VECTORS, record.vectors)
    if vectors is None or vectors.sha256 != record.vectors_sha256:
        raise UserError(f"--index_dir={folder}: its vectors are incomplete or damaged: {_BUILD} to mend them.")
    return vectors, _opened(folder, record, vectors, nprobe)


def _opened(folder: Path, record: IndexRecord, vectors: VectorShards, nprobe: int) -> Index:
    if record.seal is None:
        if nprobe:
            raise UserError(f"--nprobe={nprobe} goes with an index that has lists (IVF...), not with {record.factory}.")
        return ExactIndex(vectors)
    if (seal := unbroken_seal(folder, record)) is None:
        raise UserError(f"{folder / INDEX} is damaged: {_BUILD} to mend it.")
    if seal != record.seal:  # a copied file was hashed, for the last time if this can be written
        with contextlib.suppress(UserError):
            dataclasses.replace(record, seal=seal).write(folder)
    return ApproximateIndex(read_index(folder / INDEX), record.factory, vectors, nprobe or record.nprobe)


def unbroken_seal(folder: Path, record: IndexRecord, verify: bool = False) -> Seal | None:
    """The seal of index.faiss as it holds now; None where the file is missing or another. verify: hash it."""
    try:
        return record.seal and record.seal.renewed(folder, verify)
    except UserError:
        return None
