"""A run's own page: training writes it at its end, and never loses the run to it."""

import pytest

from ragjax.reporting import write_run_report
from ragjax.training import run as training_run
from ragjax.training import train
from tests.tiny_runs import tiny_world

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


def test_training_ends_with_a_page(world, tmp_path, capsys, monkeypatch):
    config = world.config(tmp_path / "run", max_steps=2, seed=3)

    def fail(files):
        raise ZeroDivisionError("no pen")

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "write_run_report", fail)
        summary = train(config)
    page = tmp_path / "run" / "report.html"
    assert summary.n == 6
    assert not page.exists()
    assert f"{page} was not written (no pen): the same command tries again." in capsys.readouterr().err
    monkeypatch.setattr(training_run, "write_run_report", write_run_report)
    assert train(config).after == summary.after
    assert f"report: {page}" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    for words in ("RAG-Tok. on data", "Learning curves", "Where the cost went", "--seed=3", "Recall@5"):
        assert words in text
