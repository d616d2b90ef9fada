"""The cache folder, which all runs of a user share."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

from ragjax.errors import UserError

# What to do where the cache has no room.
CACHE_MEND = "set RAGJAX_CACHE to a folder with room"


def default_cache_dir() -> Path:
    """$RAGJAX_CACHE, else ~/.cache/ragjax. Raises UserError where neither is known."""
    try:
        return Path(os.environ.get("RAGJAX_CACHE") or "~/.cache/ragjax").expanduser()
    except RuntimeError as error:  # as for a user that a container makes up
        raise UserError(
            "this user has no home folder, so there is no place for the cache: set RAGJAX_CACHE to a folder that "
            "can be written."
        ) from error


def caching(what: str, path: Path) -> contextlib.AbstractContextManager[None]:
    """`storing` in the cache."""
    return storing(what, path, CACHE_MEND)


@contextlib.contextmanager
def storing(what: str, path: Path, mend: str) -> Generator[None, None, None]:
    """Rewords what the file system refuses while `what` (a plural, "the passage vectors") is stored at `path`.

    mend: what to do instead of making room there.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what} cannot be stored at {path} ({error.strerror or error}): make room there or {mend}"
        ) from error
