"""The words that a lexical index counts, of texts in any script.

Choices. Case, accents and the width of a character do not count: NFKC, case folded, the combining marks of Latin, Greek
and Cyrillic (U+0300 to U+036F) removed; other scripts keep theirs, which are vowels there. A word is a run of letters,
digits and marks. Scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) give pairs of
neighbouring characters, as Lucene's CJK analyser does; a character without a neighbour stands for itself. No word is
left out and none is cut to a stem: that would need to know the language, and a frequent word weighs next to nothing.
"""

import functools
import itertools
import re
import sys
import unicodedata

from ragjax.metrics import UNSPACED_RANGES

RULES = 1  # raise it when a text gives other words: stored indexes are then built again
_ASCII = re.compile("[a-z0-9]+")
_ACCENTS = re.compile("[\u0300-\u036f]")


def words_of(text: str) -> list[str]:
    """The words of a text, in order, repeated ones included."""
    if text.isascii():  # the same by a short way
        return _ASCII.findall(text.lower())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = unicodedata.normalize("NFC", _ACCENTS.sub("", unicodedata.normalize("NFD", folded)))
    found: list[str] = []
    for match in _runs().finditer(folded):
        word = match.group()
        found += _pairs(word) if match.lastgroup == "unspaced" else [word]
    return found


def _pairs(run: str) -> list[str]:
    return [run] if len(run) == 1 else [first + second for first, second in itertools.pairwise(run)]


@functools.cache
def _runs() -> re.Pattern[str]:
    """Runs of a script without spaces, in the group `unspaced`, or of letters, digits and marks of the others."""
    marks = "".join(
        character for character in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(character)[0] == "M"
    )
    return re.compile(
        rf"(?P<unspaced>[{UNSPACED_RANGES}]+)|(?:[^\W_{UNSPACED_RANGES}]+|(?![{UNSPACED_RANGES}])[{marks}])+"
    )
