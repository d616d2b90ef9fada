"""The one place that speaks: what it prints where, and the silence of every process but the first."""

import json

import jax
import numpy as np
import pytest

from ragjax.data.passages import PassageList
from ragjax.data.questions import Passage
from ragjax.files import KeyedRecords, append_line, plan_text, read_json, write_atomic, write_folder, write_json
from ragjax.retrieval import cached_vectors
from ragjax.runs import RunFolder
from ragjax.training.records import MetricsLog
from ragjax.voice import counted, is_first, progress, say, warn


@pytest.fixture
def second(monkeypatch):
    """This process is the second one."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)


def speak():
    say("one")
    say("two", end="", flush=True)
    say("three", to_stderr=True)
    warn("four")
    with progress(total=2, desc="five", unit="step") as bar:
        bar.update()
    assert list(progress([1, 2], desc="six", unit="batch")) == [1, 2]


def test_the_first_process_speaks(capsys):
    assert is_first()
    speak()
    out, err = capsys.readouterr()
    assert out == "one\ntwo"
    assert err.startswith("three\nwarning: four\n")
    assert "five:" in err and "1/2" in err and "six: 100%" in err and "batch/s" in err


def test_every_other_one_is_silent(second, capsys):
    assert not is_first()
    speak()
    assert capsys.readouterr() == ("", "")


def test_what_a_process_says_of_itself_needs_no_device(monkeypatch, capsys):
    def wake():
        raise AssertionError("the devices were woken")

    monkeypatch.setattr(jax, "process_index", wake)
    say("error: no room", to_stderr=True, everywhere=True)
    assert capsys.readouterr() == ("", "error: no room\n")


def test_a_bar_that_is_not_wanted_is_not_drawn(capsys):
    with progress(total=2, desc="five", unit="step", shown=False) as bar:
        bar.update()
    assert capsys.readouterr() == ("", "")


def write_all(folder):
    """Everything that goes into a run folder, checkpoints apart: orbax knows its processes itself."""
    files = RunFolder(folder / "run")
    with files.held():
        write_atomic(folder / "run" / "a.txt", "a")
        write_json(files.summary_file, {})
        append_line(folder / "run" / "b.jsonl", "{}")
        log = MetricsLog(files)
        log.start_phase("joint")
        log.write({"phase": "joint", "step": 1, "loss": 0.5})
        log.close()
        records = KeyedRecords(files.likelihoods_file)
        records.add({"key": [1.0]})
        assert records["key"] == [1.0]
    write_folder(folder / "exported", [plan_text("a.txt", "a")])


def test_the_first_process_writes(tmp_path):
    write_all(tmp_path)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    (events,) = [name for name in found if "tfevents" in name]
    assert found - {events} == {
        "exported/a.txt",
        "run/.lock",
        "run/a.txt",
        "run/b.jsonl",
        "run/likelihoods.jsonl",
        "run/metrics.jsonl",
        "run/summary.json",
    }


def test_no_other_one_writes(second, tmp_path):
    write_all(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_of_another_host_is_filled(second, tmp_path):
    """Each host has a cache of its own."""

    class Encoder:
        passage_record, width, asked = {"sha256": "mini"}, 2, 0

        def passage_tokens(self, passages):
            return [[len(text)] for text in passages]

        def encode_tokens(self, tokens, *, advance=None):
            self.asked += 1
            return np.eye(2, dtype=np.float32)[[length % 2 for (length,) in tokens]]

    store, encoder = PassageList([Passage("1", "", "a"), Passage("2", "", "bb")]), Encoder()
    for _ in range(2):
        kept = cached_vectors(encoder, store, tmp_path, show_progress=False)
        np.testing.assert_array_equal(kept.vectors_of([0, 1]), [[0, 1], [1, 0]])
        assert encoder.asked == 1
    write_json(tmp_path / "x.json", [1], everywhere=True)
    assert read_json(tmp_path / "x.json") == [1] == json.loads((tmp_path / "x.json").read_text())
    write_folder(tmp_path / "folder", [plan_text("a.txt", "a")], everywhere=True)
    assert (tmp_path / "folder" / "a.txt").read_text() == "a"


@pytest.mark.parametrize(
    ("count", "noun", "said"),
    [(1, "device", "1 device"), (0, "device", "0 devices"), (1200, "group", "1,200 groups"), (2, "batch", "2 batches")],
)
def test_what_is_counted_agrees_with_its_number(count, noun, said):
    assert counted(count, noun) == said
