"""Writes a report: one HTML page that needs nothing else, and the same as Markdown, CSV and JSON.

The only file that imports jinja2. Everything from the data is escaped: by jinja2 in the page, by `_in_markdown` in the
Markdown.
"""

import csv
import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from ragjax.costs import PARTS, TRAINING_PARTS
from ragjax.evaluation import METRICS
from ragjax.files import write_atomic, write_json
from ragjax.reporting import formats, paper
from ragjax.reporting.advice import Advice, advise
from ragjax.reporting.cells import LABELS, REFERENCE, Cell, row_of
from ragjax.reporting.curves import read_search
from ragjax.reporting.examples import Examples, find_examples
from ragjax.reporting.findings import Findings, PairFindings, RowFindings, as_json, by_pair, find
from ragjax.reporting.pictures import PairPictures, draw_pair, draw_search
from ragjax.reporting.setups import read_setup
from ragjax.runs import RunFolder, Summary
from ragjax.voice import duration

# Of each metric in the CSV file.
_ENDS = ("before", "after", "change", "low", "high")
_MARKDOWN_SIGNS = re.compile(r"([\\`*_\[\]|~$])")


@dataclasses.dataclass(frozen=True)
class Report:
    """The files of a report, and what a command prints of it."""

    html: Path
    markdown: Path
    csv: Path
    json: Path
    findings: Findings
    advice: list[str]  # sentences


@dataclasses.dataclass(frozen=True)
class _Pair:
    """What the templates show of one pair of models."""

    findings: PairFindings
    advice: Advice
    unit: str  # of its costs
    examples: Examples | None
    example_label: str
    pictures: PairPictures


def write_report(
    cells: Sequence[Cell],
    folder: Path,
    *,
    command: str,
    title: str,
    searches: Sequence[RunFolder] = (),
    with_texts: bool = True,
) -> Report:
    """Writes report.html, report.md, report.csv and report.json into `folder`.

    Args:
      cells: finished or failed runs; those of one pair of models were measured on the same questions.
      folder: made where it is missing.
      command: what makes the report, or the runs, again.
      title: of the page.
      searches: folders of learning-rate searches.
      with_texts: False leaves out all that the data say (questions, answers, passages, predictions) and folders'
        places, for reports on data that may not be published.

    Raises:
      UserError: cells that do not go together, a run that is neither finished nor failed, a damaged file, a file that
        cannot be written.
    """
    findings, advice, content = _content(cells, command, title, searches, with_texts)
    html = RunFolder(folder).report_file
    report = Report(
        html, *(html.with_suffix(ending) for ending in (".md", ".csv", ".json")), findings, _lines(findings, advice)
    )
    write_json(report.json, _json(findings, advice))
    write_atomic(report.csv, _csv(findings))
    write_atomic(report.markdown, _render("page.md", content))
    write_atomic(report.html, _render("page.html", content))
    return report


def write_run_report(files: RunFolder) -> Path:
    """Writes the page of one finished run into its folder. Raises UserError as `write_report` does."""
    config, summary = files.record().config, files.read_summary()
    strategy = summary.strategy if summary else config.strategy
    cell = Cell(row_of(strategy, config.objective), config.embedder, config.generator, config.seed, files)
    title = f"{LABELS[cell.row]} on {Path(config.data).name}"
    _, _, content = _content([cell], "", title, (), True)
    write_atomic(files.report_file, _render("page.html", content))
    return files.report_file


def _content(
    cells: Sequence[Cell], command: str, title: str, searches: Sequence[RunFolder], with_texts: bool
) -> tuple[Findings, list[Advice], dict[str, Any]]:
    """(findings, the advice of each pair, what the templates need)."""
    findings = find(cells, title, command, with_places=with_texts)
    searched = [read_search(files) for files in searches]
    advice = [advise(pair, bool(searched)) for pair in findings.pairs]
    content = {
        "findings": findings,
        "pairs": [
            _pair(number, pair, its, own, with_texts)
            for number, (pair, its, own) in enumerate(zip(findings.pairs, advice, by_pair(cells), strict=True))
        ],
        "searches": [(search, draw_search(search, f"search-{number}")) for number, search in enumerate(searched)],
        "setup": read_setup(cells, with_texts),
        "paper": paper,
        "is_single": len(cells) == 1,
        "parts": PARTS,
        "metrics": METRICS,
        "labels": LABELS,
    }
    return findings, advice, content


def _pair(number: int, pair: PairFindings, advice: Advice, own: Sequence[Cell], with_texts: bool) -> _Pair:
    """own: the pair's cells."""
    shown = _shown(pair, advice, own)
    summary = shown.files.read_summary() if shown else None
    unit = formats.time_unit(max((sum(row.parts.get(p, 0.0) for p in TRAINING_PARTS) for row in pair.rows), default=0))
    return _Pair(
        pair,
        advice,
        unit,
        find_examples(shown, summary, pair.metric, with_texts) if shown and summary and pair.metric else None,
        f"{LABELS[shown.row]}, seed {shown.seed}" if shown else "",
        draw_pair(pair, own, unit, f"pair-{number}"),
    )


def _shown(pair: PairFindings, advice: Advice, cells: Sequence[Cell]) -> Cell | None:
    """The run whose examples are shown: of the row that is advised or else is the best, the first seed."""
    trained = [cell for cell in cells if cell.row != "none" and not cell.failure]
    order = [advice.choice, pair.best]
    return min(trained, key=lambda cell: (cell.row not in order, cell.row != advice.choice, cell.seed), default=None)


def _lines(findings: Findings, advice: Sequence[Advice]) -> list[str]:
    """All sentences; with several pairs of models each begins with its own."""
    if len(advice) == 1:
        return advice[0].lines
    return [
        f"{pair.embedder} + {pair.generator}: {line}"
        for pair, its in zip(findings.pairs, advice, strict=True)
        for line in its.lines
    ]


def _json(findings: Findings, advice: Sequence[Advice]) -> dict[str, Any]:
    content = as_json(findings)
    for pair, its in zip(content["pairs"], advice, strict=True):
        pair["advice"] = dataclasses.asdict(its)
    return content


def _csv(findings: Findings) -> str:
    """A line a cell; shares 0..1, seconds, nothing where something was not measured."""
    lines = [
        {"row": row.row, "label": row.label, "embedder": pair.embedder, "generator": pair.generator}
        | {"seed": cell.seed, "failure": cell.failure, "folder": cell.folder}
        | (_figures(cell.summary, pair.row(REFERENCE)) if cell.summary else {})
        for pair in findings.pairs
        for row in pair.rows
        for cell in row.cells
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, max((list(line) for line in lines), key=len), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _figures(summary: Summary, reference: RowFindings | None) -> dict[str, Any]:
    """The columns of a cell with a result."""
    figures: dict[str, Any] = {name: getattr(summary, name) for name in ("strategy", "objective", "split", "n")}
    for metric in METRICS:
        ends = (summary.before.get(metric), summary.after.get(metric), *(summary.change_95.get(metric) or [None] * 3))
        figures |= {f"{metric}_{part}": end for part, end in zip(_ENDS, ends, strict=True)}
    figures |= {name: summary.cost[name] for name in ("seconds", "flops", "tokens")}
    figures |= {f"{part}_seconds": summary.cost[part]["seconds"] for part in PARTS}
    relative = summary.cost["seconds"] / reference.seconds if reference and reference.seconds else None
    return figures | {"relative_cost": relative, "peak_memory_bytes": summary.peak_memory_bytes}


def _render(name: str, content: dict[str, Any]) -> str:
    is_page = name.endswith(".html")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ragjax.reporting"),
        autoescape=is_page,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    helpers: dict[str, Any] = {"duration": duration, **{name: getattr(formats, name) for name in _FORMATS}}
    environment.globals |= helpers
    environment.filters |= {"plain": _in_markdown, "typeset": _typeset}
    return environment.get_template(f"{name}.j2").render(content)


_FORMATS = ("METRIC_NAMES", "count", "in_unit", "percent", "signed", "span", "times", "with_span")


def _typeset(number: str) -> str:
    """A number with a minus sign, which is as wide as the plus."""
    return re.sub(r"-(?=[\d.])", "\N{MINUS SIGN}", number)


def _in_markdown(text: Any) -> str:
    """A text of the data as one line of Markdown that shows it as it is."""
    words = " ".join(str(text).split())
    return _MARKDOWN_SIGNS.sub(r"\\\1", words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
