"""The files of a report: they agree, show the data as they are, and are there whatever a run lacks."""

import csv
import dataclasses
import html
import json
import re

import pytest

from ragjax.config import RunConfig, SearchConfig
from ragjax.data.dataset import load_dataset
from ragjax.errors import UserError
from ragjax.files import write_json
from ragjax.reporting import Cell, formats, paper, write_report, write_run_report
from ragjax.runs import RunFolder
from ragjax.voice import duration
from tests.reporting.cases import INPUTS, line, write_run
from tests.tiny_runs import write_data

NASTY = """<script>alert("1 & 'a'")</script> | [x](javascript:y) `code` *b*"""
FAILURE = "Step 3 has a non-finite <loss>."


def lines(f1, recall=1.0, **changes):
    return [line(number, value, recall, **changes) for number, value in enumerate(f1)]


def comparison(folder):
    """Three rows, one of two seeds, one failed."""
    start = [0.0, 0.5, 0.0, 1.0, 0.0, 0.25, 0.0, 0.0]
    tuned = [1.0, 0.5, 1.0, 0.0, 1.0, 1.0, 0.0, 0.5]
    curve = [{"phase": "generator", "step": 0, "dev_loss": 3.0}, {"phase": "generator", "step": 1, "loss": 2.5}]
    curve += [{"phase": "retriever", "step": 1, "loss": 2.5, "dev_loss": 2.0, "dev_recall_at_5": 0.5}]
    kept = {"generator": {"step": 1, "figures": {"nll_per_answer": 2.0}, "start": {"nll_per_answer": 3.0}}}
    return [
        write_run(folder / "n", "none", lines(start), lines(start)),
        write_run(folder / "g0", "generator", lines(start), lines(tuned), metrics=curve[:2], kept=kept),
        write_run(folder / "g1", "generator", lines(start), lines(tuned[::-1]), seed=1, seconds={"generator": 5400}),
        write_run(folder / "t", "two_phase", lines(start), lines([1.0, *tuned[1:]]), metrics=curve),
        Cell("rag_token", "minilm", "smollm2-135m", 0, RunFolder(folder / "failed"), FAILURE),
    ]


def visible(page):
    """What a page says, without its pictures and style."""
    text = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).replace("\N{MINUS SIGN}", "-").split())


def test_the_four_files_say_the_same_numbers(tmp_path):
    report = write_report(comparison(tmp_path), tmp_path / "out", command="the command", title="A title")
    content = json.loads(report.json.read_text())
    page, markdown = visible(report.html.read_text()), report.markdown.read_text()
    with report.csv.open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    (pair,) = content["pairs"]
    assert [row["row"] for row in pair["rows"]] == ["none", "generator", "two_phase", "rag_token"]
    assert [(cell["row"], cell["seed"]) for cell in table] == [
        ("none", "0"), ("generator", "0"), ("generator", "1"), ("two_phase", "0"), ("rag_token", "0")
    ]  # fmt: skip
    for row in pair["rows"][:3]:
        own = [cell for cell in table if cell["row"] == row["row"]]
        in_markdown = next(each for each in markdown.split("\n") if each.startswith(f"| {row['label']} |"))
        figures = []
        for metric in ("em", "f1", "recall_at_5"):
            mean = sum(float(cell[f"{metric}_after"]) for cell in own) / len(own)
            assert row["scores"][metric] == pytest.approx(mean, abs=1e-12)
            figures.append(formats.percent(mean))
            if row["row"] != "none":
                change = sum(float(cell[f"{metric}_change"]) for cell in own) / len(own)
                assert row["change"][metric][0] == pytest.approx(change, abs=1e-12)
                figures += [formats.signed(change), formats.span(row["change"][metric])]
        seconds = sum(float(cell["seconds"]) for cell in own) / len(own)
        assert row["seconds"] == pytest.approx(seconds)
        figures += [formats.in_unit(seconds, "min"), formats.times(row["relative"])]
        for figure in figures:
            assert figure in in_markdown
        said = " ".join(figures)
        assert said in " ".join(re.sub(r"advised|best mean|within chance of best", "", page).split())
    alone = next(cell for cell in table if cell["row"] == "two_phase")
    assert [float(alone[f"f1_{part}"]) for part in ("change", "low", "high")] == pair["rows"][2]["change"]["f1"]
    assert pair["advice"]["verdict"] in page
    assert report.advice[0] == pair["advice"]["verdict"]
    assert pair["advice"]["choice"] == "none" or "advised" in page


def test_a_failed_cell_stands_in_all_of_them(tmp_path):
    report = write_report(comparison(tmp_path), tmp_path / "out", command="", title="")
    assert FAILURE in visible(report.html.read_text())
    assert "Step 3 has a non-finite &lt;loss&gt;." in report.markdown.read_text()
    with report.csv.open(encoding="utf-8") as file:
        assert [cell["failure"] for cell in csv.DictReader(file)] == [""] * 4 + [FAILURE]
    row = json.loads(report.json.read_text())["pairs"][0]["rows"][-1]
    assert (row["failures"], row["seconds"], row["cells"][0]["summary"]) == ([FAILURE], None, None)


def test_the_same_runs_give_the_same_bytes(tmp_path):
    cells = comparison(tmp_path)
    one, two = (write_report(cells, tmp_path / name, command="c", title="t") for name in ("1", "2"))
    for name in ("html", "markdown", "csv", "json"):
        assert getattr(one, name).read_bytes() == getattr(two, name).read_bytes()


def test_what_the_data_say_is_text(tmp_path):
    passages = [{"id": NASTY, "probability": 1.0}]
    before = lines([0.0], question=NASTY, prediction=NASTY, answers=[NASTY], passages=passages)
    after = lines([1.0], question=NASTY, prediction=NASTY, answers=[NASTY], passages=passages)
    cell = write_run(tmp_path / "r", "generator", before, after, generator=NASTY)
    report = write_report([cell], tmp_path / "out", command=NASTY, title=NASTY)
    page = report.html.read_text()
    assert "<script" not in page
    assert visible(page).count(NASTY) >= 6
    escaped = r"""&lt;script&gt;alert("1 &amp; 'a'")&lt;/script&gt; \| \[x\](javascript:y) \`code\` \*b\*"""
    assert escaped in report.markdown.read_text()


def test_a_page_needs_nothing_else(tmp_path):
    page = write_report(comparison(tmp_path), tmp_path / "out", command="", title="").html.read_text()
    assert re.findall(r"<(?:script|link|img|iframe|object|embed)\b|@import", page) == []
    targets = ["".join(found) for found in re.findall(r"(?:href|src)=\"([^\"]*)\"|url\(([^)]*)\)", page)]
    assert [target for target in targets if not target.startswith("#")] == []
    names = re.findall(r'\bid="([^"]*)"', page)
    assert len(names) == len(set(names)) > 0
    assert {target[1:] for target in targets} <= set(names)


def test_pictures_have_the_colours_of_the_page(tmp_path):
    page = write_report(comparison(tmp_path), tmp_path / "out", command="", title="").html.read_text()
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert re.findall(r"(?:fill|stroke): (?!var\(|url\(|none)[^;\"]+", pictures) == []
    assert "var(--ink)" in pictures
    assert "font-family" not in pictures


def test_titles_and_texts_come_from_the_data_while_they_are_there(tmp_path):
    passages = [{"id": "p0", "title": "A title of it", "text": "Its text."}]
    question = {"id": "q0", "question": "Question 0?", "answers": ["accepted 0"], "positive_ids": []}
    data = write_data(tmp_path / "data", passages, {"test": [question]})
    inputs = INPUTS | {"data": {"name": "data", "sha256": load_dataset(data).sha256}}
    read = {"passages": [{"id": "p0", "probability": 1.0}]}
    cell = write_run(
        tmp_path / "r", "generator", lines([0.0], **read), lines([1.0], **read), inputs=inputs, data=str(data)
    )

    def page():
        return visible(write_report([cell], tmp_path / "out", command="", title="").html.read_text())

    assert "A title of it Its text." in page()
    corpus = data / "corpus.jsonl.gz"
    other = write_data(tmp_path / "other", [passages[0] | {"text": "Another."}], {"test": [question]})
    corpus.write_bytes((other / "corpus.jsonl.gz").read_bytes())
    assert "A title of it" not in page()
    corpus.unlink()
    assert "p0" in page()


def test_models_in_folders_have_their_examples_without_places_too(tmp_path):
    """Two embedders whose folders have one name are two pairs, each with the examples of its own run."""
    cells = [
        write_run(tmp_path / name, "generator", lines([0.0]), lines([1.0]), embedder=f"/models/{name}/tuned")
        for name in ("one", "two")
    ]
    cells = [
        dataclasses.replace(cell, embedder=f"/models/{name}/tuned")
        for cell, name in zip(cells, ("one", "two"), strict=True)
    ]
    pages = [
        write_report(cells, tmp_path / "out", command="", title="", with_texts=texts).html.read_text(encoding="utf-8")
        for texts in (True, False)
    ]
    assert [page.count("q0") for page in pages] == [len(cells)] * 2


def test_the_set_up_names_an_index_and_a_reranker(tmp_path):
    """Among the inputs and the flags; without their folders where places are not to be shown."""
    inputs = INPUTS | {
        "index_dir": {"source": "IVF4,Flat", "sha256": "1dec" * 16},
        "rerank": {"source": "/there/cross: local folder, not quantised", "sha256": "c055" * 16},
    }
    flags = {"index_dir": "/there/index", "rerank": "/there/cross"}
    before, after = lines([0.0]), lines([1.0])
    cells = [
        write_run(tmp_path / row, row, before, after, inputs=each, **given)
        for row, each, given in (("generator", INPUTS, {}), ("two_phase", inputs, flags))
    ]
    for texts, folder in ((True, "/there/"), (False, "")):
        report = write_report(cells, tmp_path / "out", command="", title="", with_texts=texts)
        for page in (visible(report.html.read_text()), report.markdown.read_text()):
            assert "IVF4,Flat" in page and "1dec1dec1dec" in page and "c055c055c055" in page
            assert f"--index_dir={folder}index" in page and f"--rerank={folder}cross" in page
            assert f"{folder}cross: local folder" in page and texts == ("/there" in page)


def test_without_texts_only_ids_and_figures_are_published(tmp_path):
    before, after = (lines(f1, question="A secret?", prediction="secret", answers=["secret"]) for f1 in ([0.0], [1.0]))
    cell = write_run(tmp_path / "home" / "run", "generator", before, after, data=str(tmp_path / "home" / "licensed"))
    report = write_report([cell], tmp_path / "out", command="", title="", with_texts=False)
    for path in (report.html, report.markdown, report.csv, report.json):
        text = path.read_text()
        assert "secret" not in text
        assert str(tmp_path) not in text
    assert "q0" in report.html.read_text()
    assert "--data=licensed" in report.html.read_text()


@pytest.mark.parametrize(
    ("f1", "recall", "flags"),
    [
        ([0.0, 1.0], None, {}),
        ([None, None], 0.5, {"decode": "none"}),
        ([None, None], None, {"decode": "none"}),
        ([1.0], 1.0, {}),
    ],
    ids=["no labels", "no answers", "nothing known", "one question"],
)
def test_a_run_that_lacks_something_has_a_page(tmp_path, f1, recall, flags):
    cell = write_run(tmp_path / "r", "rag_token", lines(f1, recall), lines(f1, recall), **flags)
    path = write_run_report(cell.files)
    assert path == tmp_path / "r" / "report.html"
    page = visible(path.read_text())
    assert "RAG-Tok. on sample" in page
    assert "The paper's figures" not in page
    assert ("Recall@5" in page) or recall is None
    assert "None" not in page and "nan" not in page


def test_a_search_is_drawn_with_its_winner(tmp_path):
    trial = {"phase": "retriever", "steps": 1, "diverged": False, "dev_loss": 1.5, "f1": 0.25}
    lost = trial | {"rates": {"embedder": 1e-4}, "diverged": True, "dev_loss": None, "f1": None}
    record = {
        "flags": dataclasses.asdict(RunConfig(strategy="two_phase")),
        "options": dataclasses.asdict(SearchConfig()),
        "strategy": "two_phase",
        "trials": [trial | {"rates": {"embedder": 1e-6}}, lost],
        "winner": {"embedder": 1e-6},
        "cost": {"seconds": 90.0},
    }
    search = RunFolder(tmp_path / "search")
    write_json(search.search_file, record)
    report = write_report(comparison(tmp_path), tmp_path / "out", command="", title="", searches=[search])
    assert "Chosen by F1 on the dev questions, in 1.5 min of training: embedder 1e-06." in visible(
        report.html.read_text()
    )
    assert 'aria-label="retriever: F1: embedder 1e-06: 0.25"' in report.html.read_text()
    assert "| retriever | 0.0001 | - | diverged |" in report.markdown.read_text()


def test_the_papers_figures_are_marked_as_others(tmp_path):
    page = visible(write_report(comparison(tmp_path), tmp_path / "out", command="", title="").html.read_text())
    assert "Other data, models and machines than above" in page
    assert "2-Phase 30.0 41.3 25.1 61.0 2.56" in page
    assert round(paper.relative_cost("PopQA", "two_phase"), 1) == 3.2  # as the paper says


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be written"):
        write_report(comparison(tmp_path), tmp_path / "file", command="", title="")


def test_durations_are_for_people():
    assert [duration(seconds) for seconds in (0.4, 89, 91, 569, 571, 3599, 3600, 7500)] == [
        "0 s", "89 s", "1.5 min", "9.5 min", "10 min", "1 h 00 min", "1 h 00 min", "2 h 05 min"
    ]  # fmt: skip
