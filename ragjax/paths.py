"""Paths as users write them, and as they are from any directory. Imports nothing of ragjax but its errors."""

import os

from ragjax.errors import UserError


def expanded(path: str | os.PathLike) -> str:
    """The path with ~ spelled out, which a shell leaves alone in --flag=~/folder.

    Raises UserError where there is no such home: a folder named ~ is nobody's wish.
    """
    path = os.fspath(path)
    found = os.path.expanduser(path)
    if found.startswith("~") and not os.path.lexists(found):
        raise UserError(f"{path} begins at a home folder that is not known: write the whole path.")
    return found


def located(name: str) -> str:
    """A local folder or .gguf file by its absolute path; what is none (a short name, a hub id) as it is."""
    is_local = os.path.isdir(name) or (os.path.isfile(name) and name.endswith(".gguf"))
    return os.path.abspath(name) if is_local else name


def is_same(one: str, other: str) -> bool:
    """Whether two spellings name one place."""
    return one == other or os.path.realpath(one) == os.path.realpath(other)
