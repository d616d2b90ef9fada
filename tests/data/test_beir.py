"""Folders in BEIR's layout, and splits under other libraries' names."""

import json

import pytest

from ragjax.data.dataset import load_dataset
from ragjax.data.questions import Passage, Question
from ragjax.errors import UserError

CORPUS = [
    {"_id": "d1", "title": "Ice", "text": "Frozen water.", "metadata": {}},
    {"_id": "d2", "title": "Steam alone", "text": ""},
]
QUERIES = [{"_id": "1", "text": "what is ice", "metadata": {}}, {"_id": "2", "text": "what is steam"}]
HEADER = "query-id\tcorpus-id\tscore\n"


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def beir(folder, **qrels: str):
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(jsonl(CORPUS))
    (folder / "queries.jsonl").write_text(jsonl(QUERIES))
    for split, text in qrels.items():
        (folder / "qrels" / f"{split}.tsv").write_text(text)
    return folder


def refused(folder) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset(folder)
    return str(caught.value)


def test_a_folder_is_read_without_answers(tmp_path):
    folder = beir(tmp_path / "d", test=HEADER + "2\td2\t2\n1\td2\t0\n1\td1\t1\n1\td1\t1\n", train="1\td1\t1\r\n")
    dataset = load_dataset(folder)
    assert list(dataset.passages) == [Passage("d1", "Ice", "Frozen water."), Passage("d2", "", "Steam alone")]
    # In the queries' order, each positive once, and none with a score of 0.
    assert dataset.test == [Question("1", "what is ice", (), ("d1",)), Question("2", "what is steam", (), ("d2",))]
    assert dataset.train == [Question("1", "what is ice", (), ("d1",))]
    assert dataset.dev == []
    assert dataset.note == "BEIR's layout, without answers"
    with pytest.raises(UserError, match=r'queries.jsonl: the question with the id "1" has no answers, which --decode='):
        dataset.check_answers("test", dataset.test, "--decode=concat")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("3\td1\t1", 'the query id "3" is not among the queries'),
        ("1\td9\t1", 'the positive id "d9" is not in the corpus'),
        ("1 0 d1 1", "not a query's id, a passage's id and a number"),
        ("1\td1\tnan", '"score" is nan'),
        ("1\td1\tyes", "not a query's id, a passage's id and a number"),
    ],
)
def test_a_bad_judgement_is_named_with_file_and_line(tmp_path, line, fault):
    message = refused(beir(tmp_path / "d", test=HEADER + "1\td1\t1\n" + line + "\n"))
    assert f"test.tsv, line 3: {fault}; " in message


def test_one_of_two_layouts_is_asked_for(tmp_path):
    folder = beir(tmp_path / "d", test=HEADER + "1\td1\t1\n")
    (folder / "test.jsonl").write_text(jsonl([{"id": "1", "question": "Ice?", "answers": ["water"]}]))
    assert "both test.jsonl and queries.jsonl" in refused(folder)


@pytest.mark.parametrize("name", ["validation.jsonl", "val.jsonl", "valid.jsonl"])
def test_dev_has_other_names_elsewhere(tmp_path, name):
    (tmp_path / "corpus.jsonl").write_text(jsonl(CORPUS))
    (tmp_path / name).write_text(jsonl([{"id": "1", "question": "Ice?", "answers": ["water"], "positive_ids": None}]))
    dataset = load_dataset(tmp_path)
    assert dataset.dev == [Question("1", "Ice?", ("water",), ())]
    assert dataset.note == f"dev from {name}"
    dataset.check_answers("dev", dataset.dev, "--decode=concat")
    assert dataset.files == {"dev": tmp_path / name}
    (tmp_path / "dev.jsonl").write_text("")
    assert f"both dev.jsonl and {name}" in refused(tmp_path)
