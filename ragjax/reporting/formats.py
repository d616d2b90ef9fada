"""How numbers are written in a report: shares in percent, differences in points, costs in one unit a table."""

from ragjax.evaluation.statistics import Interval

METRIC_NAMES = {"em": "EM", "f1": "F1", "contains": "Contains", "recall_at_5": "Recall@5", "hit_at_5": "Hit@5"}
NOTHING = "-"
# Seconds in each unit, the largest first.
UNITS = {"h": 3600.0, "min": 60.0, "s": 1.0}


def percent(share: float | None) -> str:
    """A share 0..1 in percent, without the sign: the heading has it."""
    return NOTHING if share is None else f"{100 * share:.1f}"


def signed(difference: float | None) -> str:
    """A difference of shares in points."""
    return NOTHING if difference is None else f"{100 * difference:+.1f}"


def span(interval: Interval | None) -> str:
    """The ends of an interval of a difference, in points."""
    return NOTHING if interval is None else f"[{100 * interval[1]:+.1f}, {100 * interval[2]:+.1f}]"


def with_span(interval: Interval | None) -> str:
    """A difference with its interval, in points."""
    return NOTHING if interval is None else f"{signed(interval[0])} {span(interval)}"


def time_unit(seconds: float) -> str:
    """The largest unit of which a table's largest cost has at least one and a half."""
    return next((unit for unit, size in UNITS.items() if seconds >= 1.5 * size), "s")


def in_unit(seconds: float | None, unit: str) -> str:
    """Seconds in a unit, without its name."""
    return NOTHING if seconds is None else f"{seconds / UNITS[unit]:,.{2 if unit == 'h' else 1}f}"


def times(ratio: float | None) -> str:
    """How many times as much."""
    return NOTHING if ratio is None else f"{ratio:.2f}"


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is not one."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(names: list[str]) -> str:
    """Names as in a sentence: "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
