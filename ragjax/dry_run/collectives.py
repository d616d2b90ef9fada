"""What devices send each other in a step, read from the text of the compiled program.

An operation inside a loop counts as often as the loop runs, which XLA has written beside it where it knows. Bytes are
those of the result on one device: of an array that is summed its size, of one that is gathered the whole.
"""

import functools
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(rf" = (?P<type>.*?) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(")
_CALLED = re.compile(r"\b(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
# Each device by itself: nothing is sent.
_ALONE = re.compile(r"replica_groups=(\{\{\d+\}(,\{\d+\})*\}|\[\d+,1\])")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\]")
_BITS = {"pred": 8, "bf16": 16}


class Sent(NamedTuple):
    """Of one kind of collective, in one step."""

    times: int
    bytes: int  # on each device


def collectives_of(program: str) -> dict[str, Sent]:
    """{kind: how often and how much} of a compiled program's text, in the order of their bytes."""
    computations, entry = _computations(program)

    @functools.cache
    def total(name: str) -> tuple[Mapping[str, int], Mapping[str, int]]:
        times: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for line in computations.get(name, ()):
            if found := _OPERATION.search(line):
                if _ALONE.search(line):
                    continue
                times[found["kind"]] += 1
                sizes[found["kind"]] += _result_bytes(found["type"], found["kind"], found["start"] is not None)
                continue  # what it applies is an addition
            trips = _TRIPS.search(line)
            for role, called in _called(line):
                repeated = int(trips[1]) if trips and role == "body" else 1
                for own, inner in zip((times, sizes), total(called), strict=True):
                    for kind, value in inner.items():
                        own[kind] += repeated * value
        return times, sizes

    times, sizes = total(entry)
    return {kind: Sent(times[kind], sizes[kind]) for kind in sorted(times, key=lambda kind: -sizes[kind])}


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the one that begins."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in program.splitlines():
        if head := _COMPUTATION.match(line):
            lines = found[head[2]] = []
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return found, entry


def _called(line: str) -> list[tuple[str, str]]:
    branches = [name.strip().lstrip("%") for group in _BRANCHES.findall(line) for name in group.split(",")]
    return [*_CALLED.findall(line), *(("branch", name) for name in branches)]


def _result_bytes(written: str, kind: str, is_start: bool) -> int:
    """Of a type such as "(f32[8,16]{1,0}, f32[])". What only begins an operation may name its operands first."""
    arrays = [_array_bytes(*parts) for parts in _ARRAY.findall(written)]
    if is_start and kind == "all-gather":
        arrays = arrays[len(arrays) // 2 :]
    elif is_start and kind == "collective-permute":
        arrays = arrays[1:2]
    return sum(arrays)


def _array_bytes(dtype: str, shape: str) -> int:
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 0)
    count = 1
    for width in filter(None, shape.split(",")):
        count *= int(width)
    return count * bits // 8
