"""The cache folder, which all runs of a user share."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

from ragjax.errors import UserError


def default_cache_dir() -> Path:
    """$RAGJAX_CACHE, else ~/.cache/ragjax. Raises UserError where neither is known."""
    try:
        return Path(os.environ.get("RAGJAX_CACHE") or "~/.cache/ragjax").expanduser()
    except RuntimeError as error:  # as for a user that a container makes up
        raise UserError(
            "this user has no home folder, so there is no place for the cache: set RAGJAX_CACHE to a folder that "
            "can be written."
        ) from error


@contextlib.contextmanager
def caching(what: str, path: Path) -> Generator[None, None, None]:
    """Rewords what the file system refuses while `what` (a plural, "the passage vectors") is put into the cache."""
    try:
        yield
    except OSError as error:
        fault = f"{what} cannot be stored at {path} ({error.strerror or error})"
        raise UserError(f"{fault}: make room there or set RAGJAX_CACHE to a folder with room") from error
