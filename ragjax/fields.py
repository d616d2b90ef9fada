"""Fields of configurations: what each may hold, how it is given, and how it is written on the command line."""

import dataclasses
import math
import numbers
import os
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, Self

from ragjax.errors import UserError
from ragjax.paths import expanded, is_same, located


@dataclasses.dataclass(frozen=True)
class _Range:
    """Finite numbers from `minimum` (or `above` it) to `maximum` (or `below` it)."""

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = {"above": self.above, "at least": self.minimum, "at most": self.maximum, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)


def field(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    kind: type | None = None,
    items: tuple[str, ...] | type | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    path: bool = False,
    name: bool = False,
) -> Any:
    """A field with its flag and what it may hold.

    kind: needed where the default is None.
    items: of a tuple: what to choose from, the kind of its numbers, or str.
    minimum, above, maximum, below: of a number, or of a tuple's numbers.
    path, name: of a text that is a path, or the name of something that may also be a local folder or file.
    """
    metadata: dict[str, Any] = {"help": help, "choices": choices, "kind": kind or type(default), "items": items}
    metadata |= {"range": _Range(minimum, above, maximum, below), "path": path, "name": name}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Checked:
    """A configuration whose values are checked, and brought to their fields' types, when it is made.

    A tuple may be given as a list, as one value, or as text with commas, which is what a flag and the config.json of an
    older run hold.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                object.__setattr__(self, field.name, _checked(field, value))

    def located(self) -> Self:
        """The same with paths that hold from any directory: absolute ones."""
        paths = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value and field.metadata["path"]:
                paths[field.name] = os.path.abspath(value)
            elif value and field.metadata["name"]:
                paths[field.name] = tuple(map(located, value)) if field.metadata["items"] else located(value)
        return dataclasses.replace(self, **paths)


_KINDS = {int: numbers.Integral, float: numbers.Real, bool: bool, str: str | os.PathLike}
_KIND_NAMES: dict[type, str] = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
_KIND_MENDS: dict[type, str] = {
    int: "give one such as 5",
    float: "give one such as 0.5",
    bool: "give one of the two",
    str: "put it in quotes",
}


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """The value as the field holds it. Raises UserError where it cannot be meant."""
    name, rules = field.name, field.metadata
    kind = rules["kind"]
    if rules["items"]:
        return _checked_items(field, value)
    if not isinstance(value, _KINDS[kind]) or (kind is not bool and isinstance(value, bool)):
        # Only Python and a run's config.json can hold it: absl has checked what was typed.
        mend = f"choose from {_known(rules['choices'])}" if rules["choices"] else _KIND_MENDS[kind]
        raise UserError(f"{name}={value!r} is not {_KIND_NAMES[kind]}: {mend}, or leave it out.")
    value = kind(value)
    if rules["path"] or rules["name"]:
        value = expanded(value)
    if rules["choices"] and value not in rules["choices"]:
        raise UserError(f"--{name}={value} is not known: choose from {_known(rules['choices'])}.")
    if kind in (int, float) and value not in rules["range"]:
        raise UserError(f"--{name}={value:g} is out of range: give a number {rules['range']}.")
    return value


def _known(choices: Iterable[str]) -> str:
    return ", ".join(filter(None, choices))


def _checked_items(field: dataclasses.Field, value: Any) -> tuple:
    """The items, each once. Raises UserError for one that may not be there."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        value = list(value)  # an iterator is read once
    name, items, text = field.name, field.metadata["items"], flag_text(value)
    if not (text or field.default):
        return ()
    if "," in text and not all(map(str.strip, text.split(","))):
        raise UserError(f"--{name}={text} has an empty entry: remove the comma that is too many.")
    try:
        found = as_items(value, items)
    except (OverflowError, TypeError, ValueError):
        found = (math.nan,)
    if isinstance(items, tuple):
        if unknown := [item for item in found or ("",) if item not in items]:
            raise UserError(f"--{name}={unknown[0]} is not known: choose from {', '.join(items)}.")
    elif items is str:
        if "" in (found or ("",)):
            raise UserError(f"--{name}={text} has an empty name in its list: give names, separated by commas.")
        return tuple(expanded(str(name)) for name in found)
    elif not found or not all(item in field.metadata["range"] for item in found):
        numbers, example = "positive numbers", "1,5,10" if items is int else "1e-6,3e-6,1e-5"
        if 0 in field.metadata["range"]:
            numbers, example = "numbers from 0 on", "0,1"
        raise UserError(f"--{name}={text} is not a list of {numbers}: write it as {example}.")
    return found


def as_items(value: Any, items: tuple[str, ...] | type) -> tuple:
    """A tuple from a list, one value or text with commas, in order and each item once, without blanks around it.

    Raises ValueError or TypeError where an item is not a number of the kind `items`.
    """
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    elif not isinstance(value, Iterable):
        value = [value]
    return tuple(dict.fromkeys(item if isinstance(items, tuple) else _number(item, items) for item in value))


def _number(item: Any, kind: type) -> Any:
    number = kind(item)
    if not isinstance(item, str) and number != item:  # int(2.5) is 2
        raise ValueError(f"{item} is not {_KIND_NAMES[kind]}")
    return number


def flag_text(value: Any) -> str:
    """A field's value as it is written on the command line."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ",".join(map(str, value))
    return str(value)


def differing_fields(recorded: Mapping[str, Any], config: Checked) -> list[str]:
    """Names of the fields whose value is not the recorded one, in order; `recorded` may spell tuples in any way."""
    return [field.name for field in dataclasses.fields(config) if not _is_recorded(field, recorded, config)]


def recorded_value(recorded: Mapping[str, Any], config: Checked, name: str) -> Any:
    """The recorded value of a field; its default where the version that recorded it did not know the field."""
    return recorded.get(name, getattr(type(config), name))


def _is_recorded(field: dataclasses.Field, recorded: Mapping[str, Any], config: Checked) -> bool:
    before, items = recorded_value(recorded, config, field.name), field.metadata["items"]
    if items and before is not None:
        try:
            before = as_items(before, items) if flag_text(before) else ()
        except (OverflowError, TypeError, ValueError):
            return False
    now = getattr(config, field.name)
    if isinstance(before, str) and before and now and (field.metadata["path"] or field.metadata["name"]):
        return is_same(expanded(before), now)
    return before == now


def place_fields(config: Checked) -> list[str]:
    """Names of the fields that may hold a path: folders, and models and data, which can be named by theirs."""
    return [field.name for field in dataclasses.fields(config) if field.metadata["path"] or field.metadata["name"]]


def changed_flags(config: Checked, plain: Checked) -> list[str]:
    """Flags of the fields that are not as in `plain`, as a shell takes them."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return [
        f"--{name}={shlex.quote(flag_text(value))}" for name, value in values.items() if value != getattr(plain, name)
    ]
