"""Records from files of every kind, and what is said of those that are damaged."""

import gzip
import json

import pytest

from ragjax.data.sources import tables
from ragjax.data.sources.tables import open_table, stem_of, tables_in
from ragjax.errors import UserError
from tests.data.written import write

ROWS = [
    {"id": "a", "question": 'Tab\there, comma, "quote"?', "answers": ["x", "y,z"]},
    {"id": "b", "question": "Line\nbreak, Malmö \u2028?", "answers": ["1"]},
]


def records(path):
    return [line.record for line in open_table(path).read()]


def fault_of(path) -> str:
    with pytest.raises(UserError) as caught:
        list(open_table(path).read())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("ending", [*tables.ENDINGS])
def test_every_kind_of_file_gives_the_same_records(tmp_path, ending):
    path = write(tmp_path / f"train{ending}", ROWS)
    assert records(path) == ROWS
    assert open_table(path).columns == ("id", "question", "answers")


def test_a_json_file_may_have_an_object_a_line(tmp_path):
    path = write(tmp_path / "x.jsonl", ROWS)
    assert records(path.rename(tmp_path / "train.json")) == ROWS


@pytest.mark.parametrize("at_once", [1, 7, 64, 1 << 20])
def test_a_json_list_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(tables, "_CHARACTERS_AT_ONCE", at_once)
    rows = [{"n": n, "text": "x" * n, "deep": [{"[": "]"}]} for n in range(40)]
    path = tmp_path / "x.json"
    for text in (json.dumps(rows), json.dumps(rows, indent=2), " \n[" + ",\n".join(map(json.dumps, rows)) + "]\n"):
        path.write_text(text)
        assert records(path) == rows


def test_parts_of_one_table_are_read_in_order(tmp_path):
    for number, row in enumerate(ROWS):
        write(tmp_path / f"train-0000{number}-of-00002.parquet", [row])
    write(tmp_path / "README.md.jsonl", ROWS)
    found = tables_in(tmp_path)
    assert list(found) == ["README.md", "train"]
    assert [line.record["id"] for line in found["train"].read()] == ["a", "b"]
    assert len(found["train"].files) == 2
    assert stem_of(tmp_path / "README.md") == ""


def test_an_empty_cell_counts_as_missing(tmp_path):
    path = tmp_path / "corpus.csv"
    path.write_text("id,title,text\np1,,words\n")
    assert records(path) == [{"id": "p1", "text": "words"}]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("x.json", b'[{"a": 1}, {"a": ', "is not a whole JSON list: after entry 1 no object follows"),
        ("x.json", b'[{"a": 1}, 5]', "entry 2: it is no object"),
        ("x.json", b'{"data": [\n', "line 1: not valid JSON"),
        ("x.json", b'[{"a": "\xff"}]', "cannot be read"),
        ("x.json.gz", gzip.compress(b'[{"a": 1}]', mtime=0)[:-9], "cannot be read"),
        ("x.csv", b"a,b\n1,2\n3\n", "row 2: it has more or fewer cells than the header"),
        ("x.csv", b"a,b\n1,2\n3,4,5\n", "row 2: it has more or fewer cells than the header"),
        ("x.csv", b"a,b\n1,\xff\n", "cannot be read after row 0"),
        ("x.csv", b'a,b\n1,2\n3,"open\n5,6\n', "cannot be read after row 1 (unexpected end of data)"),
        ("x.csv", b"a,b,a\n1,2,3\n", 'has two columns "a"'),
        ("x.tsv.gz", b"a\tb\n", "cannot be read"),
        ("x.parquet", b"PAR1 no more", "cannot be read"),
    ],
)
def test_what_is_damaged_is_named(tmp_path, name, content, fault):
    path = tmp_path / name
    path.write_bytes(content)
    message = fault_of(path)
    assert str(path) in message and fault in message


def test_a_parquet_file_that_is_cut_off(tmp_path):
    path = write(tmp_path / "x.parquet", ROWS * 500)
    path.write_bytes(path.read_bytes()[:-40])
    assert f"{path} cannot be read" in fault_of(path)
