"""Whole folders from sources: what stands in them, once, or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from ragjax.api import prepare
from ragjax.config import CHUNKS, PrepareConfig
from ragjax.data import Passage, Question, load_dataset
from ragjax.data.chunking import CHUNKERS
from ragjax.data.sources.prepared import is_prepared
from ragjax.errors import UserError
from ragjax.files import default_cache_dir
from tests.data.written import write

CORPUS = [{"id": f"p{n}", "title": f"Page {n}", "text": f"This is about number {n}. {'More. ' * n}"} for n in range(12)]
QUESTIONS = [
    {"id": f"q{n}", "question": f"Which {n}?", "answers": [f"number {n}"], "positive_ids": [f"p{n}"]} for n in range(4)
]


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder of Parquet files."""
    write(tmp_path / "own" / "corpus.parquet", CORPUS)
    write(tmp_path / "own" / "train.parquet", QUESTIONS[:2])
    write(tmp_path / "own" / "test.parquet", QUESTIONS[2:])
    return tmp_path / "own"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAGJAX_CACHE", str(tmp_path / "cache"))


def prepared(source, out, **flags):
    return prepare(PrepareConfig(source=str(source), out=str(out), **flags))


def fault_of(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_source_becomes_a_folder_that_opens(own, tmp_path, capsys):
    out = prepared(own, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["corpus", "provenance.json", "test.jsonl", "train.jsonl"]
    printed = capsys.readouterr().out
    assert "12 passages, 2 / 0 / 2 questions" in printed and "labels that name a passage: 4" in printed
    assert "the rule" not in printed
    data = load_dataset(out)
    assert list(data.passages) == [Passage(**row) for row in CORPUS]
    assert data.test[0] == Question("q2", "Which 2?", ("number 2",), ("p2",))
    assert (data.name, data.note, data.dev) == ("out", "prepared from own", [])
    plain = tmp_path / "plain"
    write(plain / "corpus.jsonl", CORPUS)
    write(plain / "train.jsonl", QUESTIONS[:2])
    write(plain / "test.jsonl", QUESTIONS[2:])
    assert load_dataset(plain).sha256 == load_dataset(own).sha256 == data.sha256
    record = json.loads((out / "provenance.json").read_text())
    assert record["source"]["folder"] == str(own) and record["corpus"] is None
    assert record["source"]["files"] == ["train.parquet", "test.parquet", "corpus.parquet"]
    assert record["questions"] == {"train": 2, "test": 2} and record["passages"] == 12
    assert record["versions"]["pyarrow"]


def test_questions_and_passages_from_different_places(own, tmp_path, capsys):
    metadata = {"s_wiki_title": "page_3"}
    write(
        tmp_path / "asked" / "test.jsonl",
        [{"id": "t", "question": "?", "golden_answers": ["NUMBER 3"], "metadata": metadata}],
    )
    out = prepared(tmp_path / "asked", tmp_path / "out", corpus=str(own / "corpus.parquet"))
    assert load_dataset(out).test == [Question("t", "?", ("NUMBER 3",), ("p3",))]
    printed = capsys.readouterr().out
    assert "labels matched by page and answer: 1\n" in printed
    assert "the rule: a label that names a passage is that passage; one that" in printed
    # Ids that mean something only in their own corpus lead over the titles there.
    other = [{**row, "id": f"other{row['id']}"} for row in CORPUS]
    write(tmp_path / "other" / "corpus.jsonl", other)
    out = prepared(own, tmp_path / "out2", corpus=str(tmp_path / "other"))
    assert load_dataset(out).train[1].positive_ids == ("otherp1",)
    record = json.loads((out / "provenance.json").read_text())
    assert record["corpus"]["name"] == "other" and record["labels"]["labels matched by page and answer"] == 4


@pytest.mark.parametrize("how", [how for how in CHUNKS if how != "none"])
def test_documents_are_cut(own, tmp_path, monkeypatch, how):
    class Tokenizer:
        """Words are tokens."""

        backend_tokenizer = property(lambda self: self)

        def encode(self, text, add_special_tokens):
            return text.split()

        def describe(self):
            return "words"

    monkeypatch.setattr("ragjax.api.resolve_model", lambda name: Tokenizer())
    monkeypatch.setattr("ragjax.api.read_config", lambda model: {})
    monkeypatch.setattr("ragjax.api.load_tokenizer", lambda model, config: Tokenizer())
    size = 30 if how == "paragraphs" else 5
    out = prepared(own, tmp_path / "out", chunk=how, chunk_size=size, chunk_overlap=0)
    data = load_dataset(out)
    passages = {passage.id: passage for passage in data.passages}
    assert len(passages) > len(CORPUS)
    for row, passage in enumerate(data.passages):
        document, start = data.passages.origin(row)
        whole = next(each for each in CORPUS if each["id"] == document)
        assert passage.id.startswith(f"{document}#") and passage.title == whole["title"]
        assert whole["text"][start : start + len(passage.text)] == passage.text
    assert data.train[1].positive_ids == ("p1#1",)
    assert "number 1" in passages["p1#1"].text
    chunking = json.loads((out / "provenance.json").read_text())["chunking"]
    assert chunking == {"how": how, "size": size, "overlap": 0} | ({"tokenizer": "words"} if how == "tokens" else {})


def test_the_ways_of_cutting_are_those_that_there_are():
    assert ("none", *CHUNKERS) == CHUNKS


def test_what_is_refused_leaves_nothing(own, tmp_path):
    assert fault_of(prepared, "", tmp_path / "x") == "--source is empty: name a folder or a set."
    assert "--out is empty" in fault_of(prepared, own, "")
    assert "need --chunk" in fault_of(prepared, own, tmp_path / "x", chunk_size=4)
    smaller = fault_of(prepared, own, tmp_path / "x", chunk="words", chunk_size=4, chunk_overlap=4)
    assert "--chunk_overlap=4 has to be smaller than --chunk_size=4" in smaller
    assert f"{own} exists already" in fault_of(prepared, own, own)
    write(own / "dev.parquet", [{**QUESTIONS[0], "positive_ids": ["none"]}])
    place = f"{own / 'dev.parquet'}, row 1"
    assert f'{place}: the positive id "none" is not in the corpus' in fault_of(prepared, own, tmp_path / "x")
    write(own / "dev.parquet", [QUESTIONS[0], QUESTIONS[0]])
    assert 'row 2: the id "q0" occurs twice' in fault_of(prepared, own, tmp_path / "x")
    (own / "dev.parquet").unlink()
    write(own / "corpus.parquet", [*CORPUS, CORPUS[3]])
    assert 'passages 4 and 13 have the same id "p3"' in fault_of(prepared, own, tmp_path / "x")
    (own / "corpus.parquet").unlink()
    message = fault_of(prepared, own, tmp_path / "x")
    assert "has no passages of its own" in message and "--corpus=FOLDER" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_a_source_without_any_passage(tmp_path):
    (tmp_path / "psgs_w100.tsv").write_text("id\ttext\ttitle\n")
    message = fault_of(prepared, tmp_path, tmp_path / "x", corpus=str(tmp_path / "psgs_w100.tsv"))
    assert "psgs_w100 (a corpus) holds no passages: give it at least one" in message


def test_a_disk_without_room_is_named_before_it_is_full(own, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))
    message = fault_of(prepared, own, tmp_path / "x")
    assert "x needs more room: after 0 passages 5,000 bytes are free" in message
    assert not (tmp_path / "x").exists()


_KILLED = """
import os, signal, sys
from ragjax.data.arrow import ArrowWriter
from ragjax.data.preparing import preparation
from ragjax.data.sources import open_source
moment, source, out = sys.argv[1:]
def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)
add = ArrowWriter.add
def added(self, *arguments):
    add(self, *arguments)
    if len(self) == 7:
        self._flush()
        die()
if moment == "passages":
    ArrowWriter.add = added
elif moment == "questions":
    preparation.write_questions = die
else:
    os.rename = die
preparation.prepare(open_source(source), out, shown=False)
"""


def contents(folder: Path) -> dict[str, bytes]:
    """All files; without the times in the record of the store, which differ between two writings of the same bytes."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    record = json.loads(found["corpus/store.json"])
    for seal in [*record["shards"], *record["ids"]]:
        seal["mtime_ns"] = 0
    return found | {"corpus/store.json": json.dumps(record).encode()}


def test_killed_at_any_moment_it_is_made_anew(own, tmp_path):
    whole = contents(prepared(own, tmp_path / "whole"))
    for moment in ("passages", "questions", "rename"):
        arguments = [moment, own, tmp_path / "out"]
        done = subprocess.run([sys.executable, "-c", _KILLED, *arguments], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "out").exists() and (tmp_path / ".out.ragjax-part" / "corpus").is_dir()
    (tmp_path / ".out.ragjax-part" / "left.txt").write_text("from before")
    assert contents(prepared(own, tmp_path / "out")) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "own", "whole"]


def test_the_command(own, tmp_path):
    command = [sys.executable, "-m", "ragjax.prepare", f"--source={own}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "12 passages, 2 / 0 / 2 questions" in done.stdout
    assert len(load_dataset(tmp_path / "out").passages) == 12


def test_a_source_is_prepared_into_the_cache_once(own, tmp_path, capsys, monkeypatch):
    first = load_dataset(own)
    (folder,) = [path for path in (default_cache_dir() / "data").iterdir() if path.is_dir()]
    assert capsys.readouterr().out.startswith(f"own (ragjax's own columns) is prepared into {folder}\n")
    assert (first.name, first.folder, first.note) == ("own", own, "")
    assert first.files["test"] == own / "test.parquet" and first.split_file("dev") == "dev.jsonl"
    again = load_dataset(own)
    assert (again.sha256, capsys.readouterr().out) == (first.sha256, "")
    # A file that has changed is another source, of the same size too.
    before = (own / "test.parquet").stat()
    os.utime(own / "test.parquet", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    load_dataset(own)
    assert "is prepared into" in capsys.readouterr().out
    write(own / "train.parquet", QUESTIONS[:1])
    assert len(load_dataset(own).train) == 1
    # A damaged copy is made anew.
    shard = next((default_cache_dir() / "data").rglob("*.arrow"))
    for path in (default_cache_dir() / "data").rglob("*.arrow"):
        path.write_bytes(path.read_bytes()[:-1])
    assert list(load_dataset(own).passages) == list(first.passages) and shard.parent.is_dir()
    said = capsys.readouterr()
    assert "is not what was written: prepare the data again; it is prepared anew" in said.err
    monkeypatch.setattr("ragjax.data.dataset.prepare", None)
    assert len(load_dataset(own).train) == 1


def test_notes_and_sentences_go_on_telling_the_truth(own, tmp_path):
    (own / "test.parquet").unlink()
    write(own / "val.csv", [{"id": "v", "question": "?", "answers": "", "positive_ids": ["p1"]}, QUESTIONS[0]])
    data = load_dataset(own)
    assert data.note == "1 of them without answers; dev from val.csv"
    with pytest.raises(UserError, match=r'val.csv: the question with the id "v" has no answers'):
        data.check_answers("dev", data.dev, "--decode=concat")
    with pytest.raises(UserError, match="popqa .PopQA. has no passages of its own"):
        load_dataset("popqa")
    write(tmp_path / "passages" / "corpus.parquet", CORPUS)
    assert "passages has no questions" in fault_of(load_dataset, tmp_path / "passages")


def test_a_prepared_folder_of_another_version(own, tmp_path):
    out = prepared(own, tmp_path / "out")
    record = json.loads((out / "provenance.json").read_text())
    (out / "provenance.json").write_text(json.dumps(record | {"layout": 0}))
    assert is_prepared(out)
    assert "was prepared by another version of ragjax: prepare the data again" in fault_of(load_dataset, out)


def test_a_prepared_folder_is_a_source_too(own, tmp_path):
    out = prepared(own, tmp_path / "out")
    again = prepared(out, tmp_path / "again", chunk="words", chunk_size=3)
    data = load_dataset(again)
    positive = data.passages[data.passages.rows_of(data.train[1].positive_ids)[0]]
    assert "number 1" in positive.text and len(positive.text.split()) == 3
    assert len(data.passages) > 12
