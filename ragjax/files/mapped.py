"""Files that are read where they lie, in memory that the system lends."""

import mmap
from pathlib import Path


def map_file(path: Path) -> mmap.mmap:
    """The file's bytes, for reading. Raises OSError where it cannot be opened, ValueError where it is empty."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def give_back(mapped: mmap.mmap) -> None:
    """Lets the system have the pages that were read; it keeps them in its cache while there is room.

    Else they count as this process's memory, as long as nobody needs it more: containers with a limit may not wait.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
