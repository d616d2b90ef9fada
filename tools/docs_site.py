"""What `make docs` needs beside mkdocs: its hooks.

- Pages link to files of the repository outside docs/, as they do on a code host. The site gets a page for each of them,
  under repository/, so that every link is checked and works without a network.
- A fence ```math becomes MathML, which browsers draw by themselves.
- docs/quickstart.ipynb becomes the page quickstart.md.
- The build fails where a public name has no docstring or stands on no page, and where a page loads something from
  elsewhere.
"""

import json
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

import ragjax

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "quickstart"
# [text](target#part), where the target is no address and not a part of the same page.
_LINK = re.compile(r"\]\((?![\w+.-]+:|#)(?P<target>[^)\s#]+)(?P<part>#[^)\s]*)?\)")
_FENCE = re.compile(r"^(`{3,}).*?^\1$", re.MULTILINE | re.DOTALL)
_MATH = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LOADED = re.compile(
    r"<(?:script|img|source|iframe)\b[^>]*\bsrc=[\"']?(?:https?:)?//|<link\b[^>]*\bhref=[\"']?(?:https?:)?//"
)
_LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".sh": "sh", ".yml": "yaml"}
# What search does not look at: a page's head says so.
_UNSEARCHED = "---\nsearch: {exclude: true}\n---\n\n"

# Page of the site -> the repository's file or folder that it shows.
_shown: dict[str, str] = {}


def on_config(config: MkDocsConfig) -> None:
    """Raises PluginError where a public name is not documented."""
    package = griffe.load("ragjax", search_paths=[str(ROOT)])
    page = Path(config.docs_dir, "api.md").read_text(encoding="utf-8")
    shown = {path.rsplit(".", 1)[-1]: path for path in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    missing = [name for name in ragjax.__all__ if name != "__version__" and name not in shown]
    faults = [f"{name} stands nowhere in docs/api.md" for name in missing]
    for path in shown.values():
        found = package[path.removeprefix("ragjax.")]
        target = found.final_target if isinstance(found, griffe.Alias) else found
        faults += [f"{name} has no docstring" for name in _undocumented(target)]
    if faults:
        raise PluginError("; ".join(faults))


def _undocumented(found: griffe.Object) -> Iterator[str]:
    """The object and its public functions, properties and classes, those without a docstring."""
    if not found.has_docstring:
        yield found.path
    for name, member in found.members.items():
        if member.is_alias or name.startswith("_"):
            continue
        if member.is_function or member.is_class or "property" in member.labels:
            yield from _undocumented(member)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the notebook's page, and one for each file or folder outside docs/ that a page links to."""
    _shown.clear()
    files.append(
        File.generated(config, f"{NOTEBOOK}.md", content=_notebook(Path(config.docs_dir, f"{NOTEBOOK}.ipynb")))
    )
    open_pages = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    while open_pages:
        source, text = open_pages.pop()
        for target in _targets(source, text):
            page = _page_of(target)
            if target.startswith("docs/") or page in _shown or not (ROOT / target).exists():
                continue
            _shown[page] = target
            content = _content(target)
            hidden = File.generated(config, page, content=_UNSEARCHED + content, inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(hidden)
            open_pages.append((target, content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to the repository into links to the site's pages, and formulas into MathML."""
    here = page.file.src_uri
    source = _shown.get(here, f"docs/{here}")

    def rewritten(match: re.Match) -> str:
        (target,) = _targets(source, match[0])
        there = target.removeprefix("docs/") if target.startswith("docs/") else _page_of(target)
        if there == f"{NOTEBOOK}.ipynb" and here != f"{NOTEBOOK}.md":
            there = f"{NOTEBOOK}.md"
        return f"]({posixpath.relpath(there, posixpath.dirname(here) or '.')}{match['part'] or ''})"

    markdown = _outside_fences(markdown, lambda text: _LINK.sub(rewritten, text))
    return _MATH.sub(lambda match: convert(match[1].strip(), display="block"), markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Raises PluginError where a page loads something from elsewhere."""
    if found := _LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from elsewhere: {found[0]}")
    return output


def _targets(source: str, text: str) -> list[str]:
    """What the links of a repository's file lead to, as paths from the repository's root."""
    folder = source if (ROOT / source).is_dir() else posixpath.dirname(source)
    found: list[str] = []

    def note(part: str) -> str:
        found.extend(posixpath.normpath(posixpath.join(folder, match["target"])) for match in _LINK.finditer(part))
        return part

    _outside_fences(text, note)
    return found


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    """The text with what stands outside fences of code changed."""
    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def _page_of(target: str) -> str:
    """The page of the site that shows a file or folder outside docs/."""
    if (ROOT / target).is_dir():
        return f"repository/{target}/index.md"
    return f"repository/{target.removesuffix('.md')}.md"


def _content(target: str) -> str:
    """Markdown that shows a file or folder of the repository."""
    path = ROOT / target
    if path.is_dir():
        names = sorted({entry.name + "/" * entry.is_dir() for entry in path.iterdir() if entry.name[0] not in "._"})
        return f"# {target}/\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return f"# {target}\n\n````{_LANGUAGES.get(path.suffix, 'text')}\n{text}````\n"


def _notebook(path: Path) -> str:
    """The cells of a notebook as Markdown."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = ["".join(cell["source"]) for cell in cells]
    shown = [
        part if cell["cell_type"] == "markdown" else f"```python\n{part}\n```"
        for cell, part in zip(cells, parts, strict=True)
    ]
    return "\n\n".join([*shown, f"This page is [a notebook]({path.name}).\n"])
