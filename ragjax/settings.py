"""Settings that other programs have written (config.json and its like): each is read as the kind that it has to be.

What is wrong is said in one sentence with the file and the key: text where a number or true or false belongs would
otherwise be taken for true, or fail far from here. null is as good as a key that is left out.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

from ragjax.errors import UserError


class Settings(dict[str, Any]):
    """The settings of a file, or of an object `inside` it; a dict that knows where it comes from."""

    def __init__(self, content: Mapping[str, Any], where: str | os.PathLike, inside: str = ""):
        super().__init__(content)
        self.where, self.inside = where, inside

    @classmethod
    def of(cls, content: Mapping[str, Any], where: str | os.PathLike = "config.json") -> "Settings":
        """The content as settings: itself if it is that already."""
        return content if isinstance(content, cls) else cls(content, where)

    def fault(self, key: str, words: str) -> UserError:
        """An error that says what the key holds and `words` about it."""
        return UserError(f"{self.where} has {key} = {self.get(key)!r}{self._place()}{words}")

    def boolean(self, key: str, default: bool | None = False) -> Any:
        """True or False, or the default. Raises UserError for anything else, as the other readers do."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._unfit(key, "true or false")
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` on."""
        value = self._found(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._unfit(key, f"a whole number from {least} on", value)
        return value

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        above: float = 0,
        least: float = -math.inf,
        below: float = math.inf,
    ) -> float:
        """A finite number within the bounds."""
        value = self._found(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not above < value < below or value < least:
            low = f"from {least:g} on" if least > above else f"above {above:g}"
            raise self._unfit(key, f"a number {low}" + ("" if below == math.inf else f" and below {below:g}"), value)
        return float(value)

    def text(self, key: str) -> str | None:
        """Text, or None."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self._unfit(key, "text")
        return value

    def one_of(self, key: str, default: Any, *supported: Any) -> Any:
        """One of the supported values; of equal ones of different kinds (0 and False) only that of the same kind."""
        value = self.get(key)
        value = default if value is None else value
        if not any(value == each and type(value) is type(each) for each in supported):
            verb = "are" if len(supported) > 1 else "is"
            raise self.fault(key, f", but only {listed(supported)} {verb} supported: choose another model")
        return value

    def items_of(self, key: str) -> list[Any]:
        """A list; [] where there is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            raise self._unfit(key, "a list")
        return value or []

    def section(self, key: str) -> "Settings":
        """The object under a key, without what is null in it; {} where there is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self._unfit(key, "an object")
        given = {str(name): each for name, each in (value or {}).items() if each is not None}
        return Settings(given, self.where, f"{key} of {self.inside}" if self.inside else key)

    def token_ids(self, key: str) -> list[int]:
        """Token ids: of a list, or of one number; [] where there is none."""
        value = self.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in ids):
            raise self._unfit(key, "a token id or a list of them")
        return ids

    def _found(self, key: str, default: Any) -> Any:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.where} lacks {key!r}{self._place()}: add it, or take the model's own file")
        return value

    def _unfit(self, key: str, wanted: str, value: Any = None) -> UserError:
        value = self[key] if value is None else value
        return UserError(f"{self.where} has {key} = {value!r}{self._place()} where {wanted} is needed: correct it")

    def _place(self) -> str:
        return f" in {self.inside}" if self.inside else ""


def listed(values: Any) -> str:
    """Values as they stand in a sentence: 'a', 'b' and 'c'."""
    *first, last = map(repr, values)
    return f"{', '.join(first)} and {last}" if first else last
