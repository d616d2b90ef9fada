"""Large files that are hashed once, when they are written, and again only where they may have changed.

A file's seal is its size, the time of its last change and its sha256. While size and time are as they were, its bytes
are taken to be so too: 92 GB of vectors are not read in order to open them.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from ragjax.files.plain import sha256_file, unreadable


@dataclasses.dataclass(frozen=True)
class Seal:
    """What a file was when it was written."""

    file: str  # its name inside its folder
    bytes: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "Seal":
        """Of a file as it is now. Raises UserError when it cannot be read."""
        digest = sha256_file(path)
        status = _status(path)
        return cls(path.name, status.st_size, status.st_mtime_ns, digest)

    @classmethod
    def read(cls, value: dict[str, Any]) -> "Seal":
        """From JSON. Raises TypeError where it is no seal."""
        seal = cls(**value)
        kinds = {"file": str, "bytes": int, "mtime_ns": int, "sha256": str}
        if any(type(getattr(seal, name)) is not kind for name, kind in kinds.items()):
            raise TypeError("a seal's size and time are integers, its name and hash texts")
        return seal

    def renewed(self, folder: Path, verify: bool = False) -> "Seal | None":
        """The seal of the file in `folder`, this one where nothing has changed; None where its bytes are others.

        verify: hash the file also where size and time are as they were. A file that was copied has another time and is
        hashed once: keep the seal that is returned. Raises UserError when the file cannot be read.
        """
        path = folder / self.file
        status = _status(path)
        if status.st_size != self.bytes:
            return None
        if not verify and status.st_mtime_ns == self.mtime_ns:
            return self
        if sha256_file(path) != self.sha256:
            return None
        return dataclasses.replace(self, mtime_ns=status.st_mtime_ns)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
