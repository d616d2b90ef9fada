"""Model cards: the README.md of an exported folder, which says what it is, where it comes from and how to load it."""

from dataclasses import dataclass

from ragjax.config import RunConfig
from ragjax.evaluation.report import before_after_table
from ragjax.runs import Summary
from ragjax.version import __version__
from ragjax.weights import ModelSource
from ragjax.weights.resolve import KNOWN_MODELS


@dataclass(frozen=True)
class Provenance:
    """What the cards of one export tell of its run."""

    config: RunConfig
    data: str  # its name
    state: str  # of the run, in words
    summary: Summary | None  # of a finished run


def hub_name(source: ModelSource) -> str | None:
    """The hub's name of a base model; None for one that came from a local folder or file."""
    if source.origin.startswith("local"):
        return None
    return next((model.hub for model in KNOWN_MODELS if model.short == source.name), source.name)


def card(title: str, library: str, what: str, load: str, source: ModelSource, provenance: Provenance) -> str:
    """The text of a card: `what` is a sentence or two, `load` is Python."""
    config, hub = provenance.config, hub_name(source)
    has_objective = provenance.summary is not None and provenance.summary.objective
    objective = f", objective: {config.objective}" if has_objective else ""
    parts = [
        _front_matter(library, hub),
        f"# {title}\n\n{what}",
        "\n".join(
            [
                f"- Base model: {source.describe()}",
                f"- sha256 of the base model's weights: `{source.weights_sha256}`",
                f"- Strategy: {config.strategy}{objective}, top k: {config.top_k}",
                f"- Data: {provenance.data}",
                f"- Run: {provenance.state}",
                f"- Made by ragjax {__version__}",
                "- Licence: see the base model",
            ]
        ),
        _scores(provenance.summary),
        f"## How to load it\n\n```python\n{load}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(library: str, hub: str | None) -> str:
    base = [f"base_model: {hub}"] if hub else []
    lines = ["---", f"library_name: {library}", *base, "license: other", "license_name: see-the-base-model", "---"]
    return "\n".join(lines)


def _scores(summary: Summary | None) -> str:
    if summary is None:
        return ""
    table = before_after_table(summary.before, summary.after, summary.change_95)
    heading = f"The whole pipeline on {summary.n} {summary.split} questions, before and after training:"
    return f"## Scores\n\n{heading}\n\n```\n{table}\n```"
