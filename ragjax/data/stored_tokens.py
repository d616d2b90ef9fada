"""Token ids of texts on disk, so that each passage is tokenised once for all runs of a user.

    FOLDER/KEY.sqlite   hash of a text -> its token ids, each two or four bytes, after a checksum

KEY is of what tokenises: its files' hash, and what it makes of a probe, since that may change with a library's version,
too. The file is a convenience: where it cannot be used, texts are tokenised again.
"""

import array
import hashlib
import sqlite3
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path

from ragjax.errors import reason
from ragjax.voice import warn

# What tokenizers disagree about: digits, blanks, line breaks, accents in two spellings, scripts, signs of their own.
_PROBE = (
    " In 1987, 12 345.60\t× Zürich's  cafe\u0301 naïve —\n\nпривет 東京 🙂 <s>[INST]<|im_end|> ##ing ▁a "
    "I'll U.S.-based\r\n"
)
_PATIENCE = 10  # seconds that another process may write before this one goes on without the file
_FAULTS = (sqlite3.Error, OSError)


class StoredTokens:
    """A function from text to token ids, which looks into a file first."""

    def __init__(self, tokenise: Callable[[str], list[int]], folder: Path, made_by: str):
        """
        Args:
          tokenise: the function, which depends on the text alone.
          folder: where its file stands, among those of others.
          made_by: what tokenises, a hash of its files for one.
        """
        self._tokenise, self._writes = tokenise, True
        key = hashlib.sha256(repr((made_by, tokenise(_PROBE))).encode()).hexdigest()[:32]
        self._path = folder / f"{key}.sqlite"
        self._file: sqlite3.Connection | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Without transactions of Python's own: each text counts by itself.
            self._file = sqlite3.connect(self._path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
            weakref.finalize(self, self._file.close)
            self._file.execute("PRAGMA journal_mode=WAL")  # readers and one writer do not wait for each other
            self._file.execute("PRAGMA synchronous=NORMAL")  # a machine that goes down may lose the last texts
            self._file.execute("CREATE TABLE IF NOT EXISTS tokens (text BLOB PRIMARY KEY, ids BLOB) WITHOUT ROWID")
        except _FAULTS as error:
            self._do_without(error)

    def __call__(self, text: str) -> list[int]:
        """The token ids of a text."""
        if self._file is None:
            return self._tokenise(text)
        key = hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:16]
        try:
            found = self._file.execute("SELECT ids FROM tokens WHERE text = ?", (key,)).fetchone()
            ids = _read(found[0]) if found else None
        except _FAULTS as error:
            self._do_without(error)
            return self._tokenise(text)
        if ids is None:
            ids = self._tokenise(text)
            self._write(key, ids)
        return ids

    def _write(self, key: bytes, ids: list[int]) -> None:
        if self._file is not None and self._writes:
            try:
                self._file.execute("INSERT OR REPLACE INTO tokens VALUES (?, ?)", (key, _written(ids)))
            except _FAULTS as error:  # a full disk, or one for reading alone: what it has can still be read
                self._writes = False
                self._warn(error)

    def _do_without(self, error: Exception) -> None:
        self._file = None
        self._warn(error)

    def _warn(self, error: Exception) -> None:
        warn(
            f"token ids are not kept in {self._path} ({reason(error)}), so passages are tokenised in each run: make "
            "room there, delete that file, or set RAGJAX_CACHE to a folder that can be written"
        )


def _written(ids: list[int]) -> bytes:
    numbers = array.array("H" if max(ids, default=0) < 1 << 16 else "I", ids)
    body = numbers.typecode.encode() + numbers.tobytes()
    return zlib.crc32(body).to_bytes(4, "little") + body


def _read(stored: object) -> list[int] | None:
    """None where it is damaged."""
    if not isinstance(stored, bytes) or zlib.crc32(stored[4:]).to_bytes(4, "little") != stored[:4]:
        return None
    try:
        return array.array(stored[4:5].decode(), stored[5:]).tolist()
    except (ValueError, TypeError):  # not what was written, though the checksum is right
        return None
