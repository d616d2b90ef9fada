"""The page as a browser shows it: three widths, light and dark, and print."""

import pytest

from ragjax.reporting import Cell, write_report, write_run_report
from ragjax.runs import RunFolder
from tests.browser import CHROMIUM, browser
from tests.reporting.cases import line, write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

ROWS = ("none", "embedder", "generator", "independent", "two_phase", "rag_sequence", "rag_token")
LONG = "Whatmaybethelongestwordthateverstoodinaquestionandhasnoplacetobreak" * 3
# Of everything with text of its own: the contrast of text and ground by WCAG 2.2, and the least that it may be.
CONTRASTS = """
(() => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const luminance = rgb => {
    const [r, g, b] = rgb.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = channels(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), colour = element.closest("svg") ? style.fill : style.color;
    const [a, b] = [luminance(channels(colour)), luminance(ground(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize), bold = style.fontWeight >= 700;
    found.push([element.textContent.trim().slice(0, 40), ratio, size >= 24 || (bold && size >= 18.66) ? 3 : 4.5]);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """(a comparison, a single run)."""
    folder = tmp_path_factory.mktemp("pages")
    before = [line(number, 0.25 * (number % 3), 0.5, question=LONG) for number in range(12)]
    curve = [{"phase": "joint", "step": n, "loss": 5.0 - n, "dev_loss": 4.0, "dev_recall_at_5": 0.5} for n in range(4)]
    cells = [
        write_run(
            folder / row, row, before,
            [line(n, 1.0 if n % 7 < place else 0.0, 0.5, question=LONG) for n in range(12)],
            metrics=curve, seconds={"generator": 300 * place},
        )
        for place, row in enumerate(ROWS)
    ]  # fmt: skip
    failed = Cell("rag_token", "minilm", "smollm2-135m", 1, RunFolder(folder / "f"), "Step 7 has a non-finite loss.")
    report = write_report([*cells, failed], folder / "out", command="python -m ragjax.train " + LONG, title="All rows")
    return report.html, write_run_report(cells[-1].files)


@pytest.fixture(scope="module")
def page():
    with browser() as page:
        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_a_page_fits_and_is_legible(pages, page, width, scheme):
    for path in pages:
        page.open(path, width, scheme)
        assert page.run("document.documentElement.scrollWidth") <= width
        shown = page.run("[...document.querySelectorAll('svg')].filter(s => s.getClientRects().length).map("
                         "s => [s.getBoundingClientRect().width, s.getBoundingClientRect().height])")  # fmt: skip
        assert len(shown) >= 3
        assert all(wide > 150 and high > 40 for wide, high in shown)
        contrasts = page.run(CONTRASTS)
        assert len(contrasts) > 100
        assert [each for each in contrasts if each[1] < each[2]] == []
    assert page.complaints == []


def test_the_schemes_differ(pages, page):
    grounds = []
    for scheme in ("light", "dark"):
        page.open(pages[0], 800, scheme)
        grounds.append(page.run("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]


def test_print_is_dark_on_white(pages, page):
    page.open(pages[0], 800, "dark", media="print")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("getComputedStyle(document.querySelector('svg text')).fill") == "rgb(0, 0, 0)"
    assert [each for each in page.run(CONTRASTS) if each[1] < each[2]] == []


def test_every_table_and_picture_can_be_read_without_seeing_it(pages, page):
    page.open(pages[0], 800)
    assert page.run("[...document.querySelectorAll('th')].filter(h => !h.scope).length") == 0
    words = page.run("[...document.querySelectorAll('figure [role=img]')].map(f => f.ariaLabel)")
    assert min(map(len, words)) > 20
    outside = "[...document.querySelectorAll('svg')].filter(s => !s.closest('[role=img]')).length"
    assert page.run(outside) == 0
    levels = page.run("[...document.querySelectorAll('h1,h2,h3,h4,h5')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
