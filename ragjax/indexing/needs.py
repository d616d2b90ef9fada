"""What an index will take, before it is begun: from a second or so of measured work."""

import contextlib
import dataclasses
import time
from pathlib import Path

from ragjax.data.passages import PassageStore
from ragjax.errors import UserError
from ragjax.files import free_bytes
from ragjax.pretrained import Embedder
from ragjax.retrieval import Identity
from ragjax.retrieval.faiss_index import expected_bytes, expected_seconds
from ragjax.voice import duration

_MEASURED_S = 1.0
# Lists grow by doubling while vectors are added, and the training copies its sample.
_GROWTH = 1.5
# Vectors and tokens of the shard that is being encoded, in vectors of it.
_SHARDS = 4


@dataclasses.dataclass(frozen=True)
class Needs:
    """Disk and memory in bytes, seconds of work."""

    passages: int  # whose vectors are missing
    passages_per_second: float
    index_seconds: float  # of training and filling it
    vector_bytes: int  # still to be written
    index_bytes: int  # likewise
    memory_bytes: float  # besides what the models have taken already
    free_disk: int
    free_memory: int | None  # None: this system does not tell

    @property
    def disk_bytes(self) -> int:
        return self.vector_bytes + self.index_bytes

    def describe(self) -> str:
        """The same for people."""
        encoding = self.passages / self.passages_per_second if self.passages else 0.0
        memory = "" if self.free_memory is None else f" ({self.free_memory / 1e9:.1f} GB are free)"
        rate = f" ({self.passages:,} passages at {self.passages_per_second:,.0f} a second)" if self.passages else ""
        return (
            f"about {duration(encoding)} of encoding{rate} and {duration(self.index_seconds)} for the index; "
            f"{self.disk_bytes / 1e9:.3g} GB of disk ({self.vector_bytes / 1e9:.3g} of vectors, "
            f"{self.index_bytes / 1e9:.3g} of index; {self.free_disk / 1e9:.1f} GB are free); "
            f"{self.memory_bytes / 1e9:.2g} GB of memory{memory}"
        )

    def check(self, folder: Path) -> None:
        """Raises UserError where disk or memory are not there."""
        if self.disk_bytes > self.free_disk:
            raise UserError(
                f"the index needs {self.disk_bytes / 1e9:.3g} GB in {folder}, where {self.free_disk / 1e9:.3g} GB are "
                "free: free some, choose another --index_dir, or give --vector_dtype=bfloat16 or an --index with codes "
                "(IVF...,PQ64)."
            )
        if self.free_memory is not None and self.memory_bytes > self.free_memory:
            raise UserError(
                f"building the index needs about {self.memory_bytes / 1e9:.3g} GB of memory, and "
                f"{self.free_memory / 1e9:.3g} GB are free: choose an --index with codes (IVF...,PQ64), --index=Flat, "
                "which needs none, or a lower --train_sample."
            )


def measure_needs(
    folder: Path, embedder: Embedder, store: PassageStore, identity: Identity, missing: int, factory: str, sample: int
) -> Needs:
    """Of what is still to be done.

    Args:
      folder: of the index.
      embedder, store, identity: what is encoded.
      missing: passages whose vectors are missing.
      factory: of the index; "" where it is there already, or needs no building.
      sample: vectors that it is trained on.
    """
    count, width = identity.count, identity.width
    rate = _rate(embedder, store) if missing else 0.0
    index_bytes = expected_bytes(factory, width, count) if factory else 0
    seconds = expected_seconds(factory, width, count, sample) if factory else 0.0
    memory = _GROWTH * (index_bytes + 4 * sample * width) + _SHARDS * identity.rows * 4 * width
    return Needs(
        passages=missing,
        passages_per_second=rate,
        index_seconds=seconds,
        vector_bytes=missing * identity.bytes_of_passage,
        index_bytes=index_bytes,
        memory_bytes=memory,
        free_disk=free_bytes(folder),
        free_memory=available_memory(),
    )


def _rate(embedder: Embedder, store: PassageStore) -> float:
    """Passages a second, of some that are spread over the corpus: as many as a second allows."""
    count = 32
    while True:
        count = min(count, len(store))
        texts = [store[row * len(store) // count].embedder_text for row in range(count)]
        embedder.encode_passages(texts)  # compiles
        began = time.perf_counter()
        embedder.encode_passages(texts)
        seconds = time.perf_counter() - began
        if seconds >= _MEASURED_S / 4 or count == len(store):
            return count / seconds
        count *= 4


def available_memory() -> int | None:
    """Bytes that this process may still take; None where the system does not tell."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, ValueError, StopIteration):  # a container's limit; "max" where it has none
        group = Path("/sys/fs/cgroup")
        limit, current = (int((group / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = int(next(line for line in lines if line.startswith("inactive_file ")).split()[1])
        found.append(limit - current + cached)
    return min(found, default=None)
