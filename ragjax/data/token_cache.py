"""Token ids of the passages that were read last."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence

# Four bytes each: 16 MiB, some 30,000 passages of ordinary length. A larger corpus is tokenised again as it is read.
LIMIT = 1 << 22


class TokenCache:
    """Ids by passage; what was used longest ago goes first, so that memory does not grow with the corpus."""

    def __init__(self, limit: int = LIMIT):
        """limit: tokens that are kept at most, all passages together."""
        self._limit = limit
        self._kept: OrderedDict[str, array] = OrderedDict()
        self._size = 0

    def get(self, identity: str) -> list[int] | None:
        """The passage's ids, None where they are not (or no longer) kept."""
        if identity not in self._kept:
            return None
        self._kept.move_to_end(identity)
        return self._kept[identity].tolist()

    def __setitem__(self, identity: str, tokens: Sequence[int]) -> None:
        if identity in self._kept:
            self._size -= len(self._kept.pop(identity))
        self._kept[identity] = array("i", tokens)
        self._size += len(tokens)
        while self._size > self._limit:
            _, oldest = self._kept.popitem(last=False)
            self._size -= len(oldest)
