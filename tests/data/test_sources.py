"""Data sets by folder and by name."""

import gzip
import json

import pytest

from ragjax.data.dataset import load_dataset
from ragjax.data.questions import Passage, Question
from ragjax.data.sources.opening import SAMPLE_FOLDER
from ragjax.errors import UserError

CORPUS = [{"id": "p1", "title": "Paris", "text": "A city."}, {"id": "p2", "text": "No title."}]
TRAIN = [{"id": "q1", "question": "City?", "answers": ["Paris", "paris"], "positive_ids": ["p1"]}]
TEST = [{"id": "q1", "question": "Other?", "answers": ["none"], "positive_ids": []}]


def write(folder, **files):
    """Writes stem=records as stem.jsonl; a stem that ends in _gz as stem.jsonl.gz."""
    folder.mkdir(exist_ok=True)
    for stem, records in files.items():
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        if stem.endswith("_gz"):
            (folder / f"{stem.removesuffix('_gz')}.jsonl.gz").write_bytes(gzip.compress(data))
        else:
            (folder / f"{stem}.jsonl").write_bytes(data)
    return folder


def fault_of(name):
    with pytest.raises(UserError) as caught:
        load_dataset(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder(tmp_path):
    folder = write(tmp_path / "mine", corpus_gz=CORPUS, train=TRAIN, test_gz=TEST)
    (folder / "extra_positives.jsonl.gz").write_bytes(b"not even gzip")
    (folder / "README.md").write_text("ignored")
    data = load_dataset(str(folder))
    assert (data.name, data.folder) == ("mine", folder)
    assert list(data.passages) == [Passage("p1", "Paris", "A city."), Passage("p2", "", "No title.")]
    assert data.train == [Question("q1", "City?", ("Paris", "paris"), ("p1",))]
    assert data.dev == []
    assert data.test == [Question("q1", "Other?", ("none",), ())]


def test_the_hash_is_of_the_content(tmp_path):
    plain = load_dataset(write(tmp_path / "a", corpus=CORPUS, train=TRAIN)).sha256
    assert len(plain) == 64
    assert load_dataset(write(tmp_path / "b", corpus_gz=CORPUS, train_gz=TRAIN)).sha256 == plain
    respelled = [{"text": "A city.", "more": 1, "title": "Paris", "id": "p1"}, CORPUS[1]]
    assert load_dataset(write(tmp_path / "c", corpus=respelled, train=TRAIN)).sha256 == plain
    others = [
        {"corpus": CORPUS[::-1], "train": TRAIN},
        {"corpus": [CORPUS[0], {"id": "p2", "text": "No  title."}], "train": TRAIN},
        {"corpus": CORPUS, "dev": TRAIN},
        {"corpus": CORPUS, "train": TRAIN, "dev": TRAIN},
        {"corpus": CORPUS, "train": [{**TRAIN[0], "answers": ["paris", "Paris"]}]},
        {"corpus": CORPUS, "train": [{**TRAIN[0], "positive_ids": []}]},
    ]
    hashes = {load_dataset(write(tmp_path / f"d{i}", **files)).sha256 for i, files in enumerate(others)}
    assert len(hashes | {plain}) == len(others) + 1


def test_questions_that_stand_in_two_splits_are_found(tmp_path):
    """By text and id, or by text and answers: an id alone, or a text alone, may belong to two questions."""

    def asked(identity, question, *answers):
        return {"id": identity, "question": question, "answers": answers}

    train = [asked("a", "Same?", "yes"), asked("b", "Renamed?", "x", "y"), asked("c", "Id alone?", "z")]
    train += [asked("d", "Text alone?", "one"), asked("e", "Bare?")]
    test = [
        asked("e", "Bare?"),
        asked("a", "Same?", "no"),
        asked("b2", "Renamed?", "y", "x"),
        asked("c", "Other?", "z"),
    ]
    test += [asked("d2", "Text alone?", "two"), asked("f2", "No answers?")]
    folder = write(tmp_path, corpus=CORPUS, train=train, dev=[asked("f", "No answers?"), train[0]], test=test)
    dataset = load_dataset(folder)
    found = {(split, earlier): [each.id for each in repeated] for split, earlier, repeated in dataset.repeated()}
    assert found == {("dev", "train"): ["a"], ("test", "train"): ["e", "a", "b2"], ("test", "dev"): ["a"]}
    assert dataset.note == "4 of them without answers"


def test_a_local_folder_comes_before_a_name(tmp_path, monkeypatch):
    write(tmp_path / "sample", corpus=CORPUS, test=TEST)
    write(tmp_path / "hotpotqa", corpus=CORPUS, test=TEST)
    monkeypatch.chdir(tmp_path)
    assert len(load_dataset("sample").passages) == 2
    assert load_dataset("hotpotqa").name == "hotpotqa"
    assert load_dataset("sample/.").name == "sample"


def test_home_is_expanded(tmp_path, monkeypatch):
    write(tmp_path / "mine", corpus=CORPUS, test=TEST)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_dataset("~/mine").name == "mine"


def test_sample_is_package_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not list(SAMPLE_FOLDER.glob("corpus.jsonl*")):
        pytest.skip("the sample has not been generated in this tree")
    data = load_dataset("sample")
    assert data.name == "sample"
    assert len(data.passages) >= 1500
    assert len(data.train) + len(data.dev) + len(data.test) >= 600
    assert data.train and data.dev and data.test


@pytest.mark.parametrize("name", ["", "no_such_folder", "no/such/folder", "x" * 300, "nul\0byte"])
def test_an_unknown_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    message = fault_of(name)
    assert f'there is no data folder "{name}"' in message and "--data=sample" in message


def test_a_file_instead_of_a_folder(tmp_path):
    folder = write(tmp_path / "mine", corpus=CORPUS)
    assert "is a file, not a data folder" in fault_of(folder / "corpus.jsonl")


def test_no_corpus_and_no_questions(tmp_path):
    assert "has no corpus.jsonl or corpus.jsonl.gz" in fault_of(write(tmp_path / "a", train=TRAIN))
    assert "has no questions" in fault_of(write(tmp_path / "b", corpus=CORPUS))


@pytest.mark.parametrize("stem", ["corpus", "train", "dev", "test"])
def test_both_spellings_of_one_file(tmp_path, stem):
    files = {"corpus": CORPUS, "test": TEST, stem: TEST, f"{stem}_gz": TEST}
    assert f"has both {stem}.jsonl and {stem}.jsonl.gz" in fault_of(write(tmp_path / "both", **files))


def test_a_positive_that_is_not_in_the_corpus(tmp_path):
    folder = write(tmp_path / "a", corpus=CORPUS, dev=[{**TRAIN[0], "positive_ids": ["p3"]}])
    assert f'{folder / "dev.jsonl"}, line 1: the positive id "p3" is not in the corpus' in fault_of(folder)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("hotpotqa", (14_341, 811, 150, 250)),
        ("popqa", (7_230, 943, 100, 150)),
        ("squad", (3_645, 11_826, 732, 1_087)),
    ],
)
def test_real_data(real_data, name, counts):
    data = load_dataset(real_data / name)
    assert (len(data.passages), len(data.train), len(data.dev), len(data.test)) == counts
    assert data.name == name
    assert all(question.positive_ids for question in data.train)
