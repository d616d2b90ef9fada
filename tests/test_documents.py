"""The documents: links, the flags in commands, figures against their files, and the notebook."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ragjax.config import CompareConfig
from tests.checkout import ROOT, in_checkout
from tests.tiny_runs import SPLITS, tiny_world

pytestmark = in_checkout

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*.md"), *ROOT.glob("third_party/*.md")]
)
COMMANDS = ("prepare", "train", "lr_search", "compare", "evaluate", "ask", "export", "index")
# Flags of absl itself, of pip, and of experiments/accelerator/check.py. XLA has its own, too.
OTHER_FLAGS = {"flagfile", "no-deps", "parts", "seconds", "small"}
FENCES = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def names(paths) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def cells(kind: str) -> list[str]:
    """The sources of the notebook's cells of this type."""
    return ["".join(cell["source"]) for cell in json.loads(text_of(NOTEBOOK))["cells"] if cell["cell_type"] == kind]


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").split()) < 700


# --- links


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and the site make them."""
    titles = re.findall(r"^#+ (.*)$", FENCES.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(text: str, page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    dead = []
    for target, part in re.findall(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]*))?\)", FENCES.sub("", text)):
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (part and part not in headings(path)):
            dead.append(f"{target}#{part}")
    return dead


def test_the_check_of_links_tells_right_from_wrong():
    text = "[a](faq.md) [b](nowhere.md) [c](cost.md#memory) [d](cost.md#nowhere) [e](https://a.b) [g](#no)"
    assert dead_links(text, ROOT / "docs" / "index.md") == ["nowhere.md#", "cost.md#nowhere", "#no"]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page):
    assert dead_links(text_of(page), page) == []


def test_links_of_the_notebook_lead_somewhere():
    assert dead_links("\n".join(cells("markdown")), NOTEBOOK) == []


# --- flags

# In a process of its own, because two commands may define one flag: says what cannot be parsed of each line of JSON.
PARSE = """
import importlib, json, sys
from absl import flags
importlib.import_module(f"ragjax.commands.{sys.argv[1]}")
FLAGS = flags.FLAGS
flags.DEFINE_bool("help", False, "")
flags.DEFINE_bool("version", False, "")
faults = []
for arguments in json.load(sys.stdin):
    try:
        FLAGS.unparse_flags()
        FLAGS(["", *arguments])
    except (flags.Error, OSError) as error:
        faults.append(f"{' '.join(arguments)}: {error}")
print(json.dumps({"faults": faults, "flags": list(FLAGS)}))
"""


def parsed(command: str, lines: list[list[str]]) -> dict[str, list[str]]:
    """{"faults": of the argument lists, "flags": what the command has}."""
    done = subprocess.run(
        [sys.executable, "-c", PARSE, command], input=json.dumps(lines), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def commands_in(text: str) -> list[tuple[str, list[str]]]:
    """(command, arguments) of each `python -m ragjax.COMMAND ...` in a text."""
    found = []
    for name, rest in re.findall(r"python -m ragjax\.(\w+)([^`\n]*)", text.replace("\\\n", " ")):
        words = re.split(r"\s[<|&;]|\s#\s|, |\. |\.$|[);]| \.\.\.", rest)[0]
        found.append((name, [word for word in shlex.split(words) if word.startswith("-")]))
    return found


def test_the_check_of_commands_tells_right_from_wrong():
    text = 'Run `python -m ragjax.ask --top_k=5 "a"`, then\n    python -m ragjax.ask --topk=5 \\\n  --json < file # --x'
    lines = [arguments for _, arguments in commands_in(text)]
    assert lines == [["--top_k=5"], ["--topk=5", "--json"]]
    found = parsed("ask", [*lines, ["--decode=beam"]])
    assert [fault.split(":")[0] for fault in found["faults"]] == ["--topk=5 --json", "--decode=beam"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_documents_can_be_parsed(command):
    """Names of flags, what they may hold, and the flag files that they name."""
    texts = (
        [text_of(page) for page in PAGES] + cells("markdown") + [text_of(p) for p in ROOT.glob("experiments/paper/*")]
    )
    lines = [arguments for text in texts for name, arguments in commands_in(text) if name == command]
    assert lines
    assert parsed(command, lines)["faults"] == []


def test_commands_in_the_documents_are_there():
    texts = [text_of(page) for page in PAGES]
    assert {name for text in texts for name, _ in commands_in(text)} <= {*COMMANDS}


def test_flags_in_the_text_are_there():
    """Every `--flag` in code, outside the changelog, which has those of earlier versions too."""
    known = {flag for command in COMMANDS for flag in parsed(command, [])["flags"]} | OTHER_FLAGS
    unknown = {}
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        flags = re.findall(r"`--(no)?(?!xla_)([\w-]+)", text_of(page))
        unknown[page.name] = {no + name for no, name in flags if name not in known and no + name not in known}
    assert {page: flags for page, flags in unknown.items() if flags} == {}


def test_the_page_on_comparing_lists_its_flags():
    rows = re.findall(r"^\| `--(\w+)` \|", text_of(ROOT / "docs" / "comparing.md"), re.MULTILINE)
    assert rows == [field.name for field in dataclasses.fields(CompareConfig)]


# --- figures

METRICS = {"EM": "em", "F1": "f1", "contains": "contains", "Recall@5": "recall_at_5", "hit@5": "hit_at_5"}


def result(name: str) -> dict:
    content = json.loads(text_of(ROOT / "experiments" / "results" / name))
    found = content.get("summary", content)
    return found | {"change_95": found.get("change_95") or found["intervals_of_the_change"]}


def signed(value: float) -> str:
    return "0.000" if round(value, 3) == 0 else f"{value:+.3f}"


def span(low: float, high: float) -> str:
    return f"[{signed(low)}, {signed(high)}]"


def test_tables_of_results_are_those_of_their_files():
    page = text_of(ROOT / "docs" / "results.md")
    tables = re.findall(r"results/([\w.]+)\)\):\n\n.*?\n\n\| metric .*?\n\|[-|]+\n((?:\|[^\n]*\n)+)", page, re.DOTALL)
    assert [name for name, _ in tables] == [
        "demo.json",
        "hotpotqa.joint.json",
        "hotpotqa.generator.json",
        "torch_lora.hotpotqa.json",
        "popqa.generator.json",
    ]
    for name, table in tables:
        found = result(name)
        for row in table.splitlines():
            label, *shown = [cell.strip() for cell in row.strip("|").split("|")]
            metric = METRICS[label]
            change, low, high = found["change_95"][metric]
            scores = [f"{found[moment][metric]:.3f}" for moment in ("before", "after")]
            assert shown == [*scores, signed(change), span(low, high)], (name, label)


STRATEGIES_SHOWN = (
    "untrained",
    "embedder",
    "generator",
    "independent",
    "two_phase",
    "joint, RAG-Sequence",
    "joint, RAG-Token",
)


def compared(page: str) -> list[list[str]]:
    """The cells of the page's table of strategies."""
    table = re.search(r"^\| strategy \| EM .*\n\|[-|]+\n((?:\|.*\n)+)", text_of(ROOT / page), re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[1].splitlines()]


def test_the_tables_of_strategies_are_those_of_the_comparison():
    (pair,) = json.loads(text_of(ROOT / "experiments" / "results" / "comparison.popqa.json"))["pairs"]
    in_readme, in_results = [], []
    for label, row in zip(STRATEGIES_SHOWN, pair["rows"], strict=True):
        em, f1, recall = (f"{row['scores'][metric]:.3f}" for metric in ("em", "f1", "recall_at_5"))
        minutes = row["seconds"] / 60
        in_readme.append([label, em, f1, recall, f"{minutes:.0f}"])
        changes = [shown_change(row["change"], metric) for metric in ("f1", "recall_at_5")]
        of_generator = row["seconds"] / pair["rows"][2]["seconds"]
        in_results.append([label, em, f1, changes[0], recall, changes[1], f"{minutes:.1f}", f"{of_generator:.2f}"])
    assert compared("README.md") == in_readme
    assert compared("docs/results.md") == in_results


def shown_change(changes: dict, metric: str) -> str:
    if changes.get(metric) is None:  # the untrained models'
        return ""
    change, low, high = changes[metric]
    return f"{change:+.3f} [{low:+.3f}, {high:+.3f}]" if (low, high) != (0, 0) else "0"


# --- the notebook


def test_the_notebook_is_committed_without_outputs():
    for cell in json.loads(text_of(NOTEBOOK))["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_the_notebook_runs(tmp_path_factory, tmp_path, monkeypatch, capsys):
    """Cell by cell, with tiny models and data under the names of real ones."""
    monkeypatch.chdir(tmp_path)
    with tiny_world(tmp_path_factory) as world:
        tiny = {"minilm": world.embedder, "smollm2-135m": world.generator, "sample": world.data}
        scope: dict = {}
        for number, source in enumerate(cells("code")):
            for name, folder in tiny.items():
                source = source.replace(f'"{name}"', repr(str(folder)))
            exec(compile(source, f"{NOTEBOOK.name}, cell {number}", "exec"), scope)
    printed = capsys.readouterr().out
    assert scope["run"].summary.n == SPLITS["test"]
    assert [result.top_k for result in scope["evaluation"].results] == [1, 5, 1, 5]
    assert {row.row for row in scope["report"].findings.pairs[0].rows} == {"none", "generator", "rag_token"}
    assert scope["answer"].text in printed and scope["report"].advice[0] in printed
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"notebook", "notebook-compare"}
