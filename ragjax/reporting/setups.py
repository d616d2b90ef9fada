"""How the runs of a report were made: versions, devices, models, flags, kept states, commands."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ragjax.config import RunConfig
from ragjax.fields import changed_flags, place_fields
from ragjax.files import read_json_object
from ragjax.reporting.cells import LABELS, Cell, shown
from ragjax.runs import INPUTS, Summary


@dataclasses.dataclass(frozen=True)
class CellSetup:
    """One run."""

    label: str
    seed: int
    folder: str
    learning_rates: str  # by phase and model, in words
    kept: Sequence[str]  # which state of each phase, in words
    command: str  # "" of a failed run that has left no configuration


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything, what is common to all runs once."""

    inputs: Sequence[tuple[str, str, str]]  # (kind, source, sha256)
    versions: Sequence[str]  # "name version"
    devices: Sequence[str]
    flags: Sequence[str]  # common to all cells, and not the defaults
    cells: Sequence[CellSetup]


def read_setup(cells: Sequence[Cell], with_places: bool) -> Setup:
    """What config.json and summary.json of the cells say.

    with_places: False cuts folders to their names, as paths differ between machines.
    """
    contents = [read_json_object(cell.files.config_file) if cell.files.is_begun else {} for cell in cells]
    flags = [_flags(cell, with_places) if content else None for cell, content in zip(cells, contents, strict=True)]
    known = [each for each in flags if each is not None]
    common = [flag for flag in known[0] if all(flag in each for each in known)] if known else []
    inputs = dict.fromkeys(
        (kind, _source(about, with_places), about["sha256"])
        for content in contents
        for kind, about in content.get("inputs", {}).items()
    )
    return Setup(
        inputs=sorted(inputs, key=lambda each: INPUTS.index(each[0])),
        versions=_distinct(f"{k} {v}" for content in contents for k, v in content.get("versions", {}).items()),
        devices=_distinct(device for content in contents for device in content.get("devices", ())),
        flags=common,
        cells=[
            CellSetup(
                LABELS[cell.row],
                cell.seed,
                shown(str(cell.files.path), with_places),
                _rates(content.get("learning_rates", {})),
                _kept(cell.files.read_summary()),
                f"python -m ragjax.train {' '.join(own)}" if own is not None else "",
            )
            for cell, content, own in zip(cells, contents, flags, strict=True)
        ],
    )


def _distinct(values) -> list[str]:
    return list(dict.fromkeys(values))


def _flags(cell: Cell, with_places: bool) -> list[str]:
    """Of a command that makes this run: the strategy, and all that differs from the defaults."""
    config = cell.files.record().config
    if not with_places:
        names = {name: shown(getattr(config, name), with_places) for name in place_fields(config)}
        config = dataclasses.replace(config, **names)
    changed = changed_flags(config, RunConfig(strategy=config.strategy))
    return [f"--strategy={config.strategy}", *changed]


def _source(about: Mapping[str, str], with_places: bool) -> str:
    """What a model or the data came from; a source in words begins with its place."""
    words = about.get("source") or about["name"]
    place, colon, rest = words.partition(": ")
    return f"{shown(place, with_places)}{colon}{rest}"


def _rates(by_phase: Mapping[str, Mapping[str, float]]) -> str:
    return "; ".join(
        f"{phase}: {', '.join(f'{model} {rate:g}' for model, rate in rates.items())}"
        for phase, rates in by_phase.items()
    )


def _kept(summary: Summary | None) -> list[str]:
    return [_state(phase, kept) for phase, kept in (summary.kept if summary else {}).items()]


def _state(phase: str, kept: Mapping[str, Any] | None) -> str:
    if kept is None:
        return f"{phase}: the last state"
    name = next(iter(kept["figures"]))
    figures = f"dev {name} {kept['start'][name]:.4g} -> {kept['figures'][name]:.4g}"
    return f"{phase}: the state of step {kept['step']} ({figures})"
