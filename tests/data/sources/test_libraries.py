"""What `datasets` and TFDS keep, written by these libraries themselves, and the hub's sets."""

import dataclasses
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
import tensorflow_datasets as tfds

from ragjax.data.questions import Passage
from ragjax.data.sources import Asked, Facts, Label, open_corpus, open_source
from ragjax.data.sources.hub import HUB_SETS, find_hub_set
from ragjax.data.sources.source import content_id
from ragjax.errors import UserError
from tests.data.written import write

CORPUS = [{"id": "p1", "title": "Paris", "text": "A city."}]
TRAIN = [{"id": "q1", "question": "City?", "answers": ["Paris"], "positive_ids": ["p1"]}]


def questions(source, split):
    return list(source.splits[split].questions(Counter()))


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_a_saved_dictionary(tmp_path):
    splits = {"corpus": CORPUS, "train": TRAIN, "validation": TRAIN, "unsupervised": TRAIN}
    tables = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    tables["train"].info.license = "CC0"
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "set")
    source = open_source(tmp_path / "set")
    assert list(source.passages(Counter())) == [Passage("p1", "Paris", "A city.")]
    assert list(source.splits) == ["train", "dev"]
    place = f"{tmp_path / 'set'}, split train, row 1"
    assert questions(source, "train") == [Asked("q1", "City?", ("Paris",), (Label("p1", "", place),))]
    assert (source.name, source.facts()) == ("set", Facts(None, "CC0"))
    assert tmp_path / "set" / "corpus" / "data-00000-of-00001.arrow" in source.files


def test_a_single_saved_table(tmp_path):
    datasets.Dataset.from_list(CORPUS).save_to_disk(tmp_path / "passages")
    assert len(list(open_corpus(tmp_path / "passages").passages(Counter()))) == 1
    datasets.Dataset.from_list(TRAIN, split="test").save_to_disk(tmp_path / "questions")
    assert list(open_source(tmp_path / "questions").splits) == ["test"]
    datasets.DatasetDict({"all": datasets.Dataset.from_list(TRAIN)}).save_to_disk(tmp_path / "other")
    with pytest.raises(UserError, match="has the splits all: rename those to be used to train"):
        open_source(tmp_path / "other")
    (tmp_path / "passages" / "state.json").write_text("{")
    with pytest.raises(UserError, match="passages cannot be read .*: save it again"):
        open_source(tmp_path / "passages")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Builder's name -> its folder."""
    # As a module of no package: those of packages TFDS looks up with a library that it does not bring.
    spec = importlib.util.spec_from_file_location("tiny_tfds", Path(__file__).with_name("tiny_tfds.py"))
    sys.modules["tiny_tfds"] = tiny_tfds = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_tfds)
    folder = tmp_path_factory.mktemp("tfds")
    found = {}
    tfds.disable_progress_bar()
    for builder_type in (tiny_tfds.TinySquad, tiny_tfds.TinyWikipedia, tiny_tfds.TinyPictures):
        builder = builder_type(data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
        found[builder.name] = builder.data_path
    return found


def test_a_tfds_folder_of_questions(prepared):
    source = open_source(prepared["tiny_squad"])
    passage = Passage(content_id("squad", "T", "Malmö is."), "T", "Malmö is.")
    assert list(source.passages(Counter())) == [passage]
    asked = Asked("2", "Where?", ("Malmö", "M"), (Label(passage.id, "T"),))
    assert questions(source, "test") == [asked]
    assert questions(source, "train") + questions(source, "dev") == [dataclasses.replace(asked, id="1")]
    assert (source.name, source.facts()) == ("tiny_squad", Facts("1.2.0", "CC0"))
    assert "tensorflow" not in sys.modules


def test_a_tfds_folder_of_passages_without_ids(prepared):
    dropped = Counter()
    passages = list(open_corpus(prepared["tiny_wikipedia"]).passages(dropped))
    assert passages == [Passage(content_id("passage", "A", "Ä."), "A", "Ä."), Passage(passages[1].id, "", "B")]


def test_other_tfds_folders_are_refused_by_name(prepared, tmp_path):
    with pytest.raises(UserError, match="tiny_pictures/1.2.0 has the splits pictures: rename"):
        open_source(prepared["tiny_pictures"])
    info = json.loads((prepared["tiny_squad"] / "dataset_info.json").read_text())
    (tmp_path / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    (tmp_path / "features.json").write_text("{}")
    with pytest.raises(UserError, match="format tfrecord, which only TensorFlow reads: prepare the set again"):
        open_source(tmp_path)
    with pytest.raises(UserError, match="tfds:no_such_set cannot be read"):
        open_source("tfds:no_such_set")


@pytest.mark.parametrize(("package", "extra"), [("datasets", "datasets"), ("tensorflow_datasets", "tfds")])
def test_a_missing_package_is_named_with_the_command_that_brings_it(prepared, tmp_path, monkeypatch, package, extra):
    datasets.Dataset.from_list(CORPUS).save_to_disk(tmp_path / "set")
    folder = tmp_path / "set" if extra == "datasets" else prepared["tiny_squad"]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package [a-z-]+: pip install 'ragjax\[{extra}\]'$"):
        open_source(folder)
    if extra == "datasets":
        with pytest.raises(UserError, match="the data set hotpotqa/distractor needs the package datasets: pip"):
            open_source("hotpotqa").facts()


HOTPOT = {
    "id": "5a7",
    "question": "Which?",
    "answer": "A",
    "supporting_facts": {"title": ["A"], "sent_id": [0]},
    "context": {"title": ["A"], "sentences": [["A is.", " It was."]]},
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Repositories as the hub has them, in folders of their names: `datasets` looks there first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for configuration in ("distractor", "fullwiki"):
        folder = tmp_path / "hotpotqa" / "hotpot_qa" / configuration
        write(folder / "train-00000-of-00001.parquet", [HOTPOT])
        write(folder / "validation-00000-of-00001.parquet", [{**HOTPOT, "id": configuration}])
    files = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in ("train", "validation"))
        for name in ("distractor", "fullwiki")
    )
    (tmp_path / "hotpotqa" / "hotpot_qa" / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    write(tmp_path / "nothing_else" / "x.jsonl", [])
    return tmp_path


@pytest.mark.parametrize("name", ["hotpotqa/distractor", "hotpotqa/fullwiki", "hotpotqa/hotpot_qa/fullwiki"])
def test_a_set_of_the_hub(hub, name, monkeypatch):
    monkeypatch.setattr("ragjax.data.sources.opening.find_folder", lambda name: None)
    source = open_source(name)
    assert source.name == f"hotpotqa/{name.rpartition('/')[2]}" and source.folder is None and source.files == ()
    assert [each.id for each in questions(source, "test")] == [name.rpartition("/")[2]]
    assert [passage.title for passage in source.passages(Counter())] == ["A"]
    revision, licence = source.facts()
    assert revision and licence == "CC BY-SA 4.0"


def test_a_set_that_is_out_of_reach(hub, monkeypatch):
    monkeypatch.setattr("ragjax.data.sources.opening.find_folder", lambda name: None)
    for name, words in (("popqa", "akariasai/PopQA"), ("hotpotqa/other", "BuilderConfig 'other' not found")):
        with pytest.raises(UserError, match="could not be had from the hub or its cache") as caught:
            questions(open_source(name), "test")
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_set_whose_columns_have_changed(hub, monkeypatch):
    write(hub / "akariasai" / "PopQA" / "test.parquet", [{"id": 1, "question": "?", "answers_of_it": "x"}])
    with pytest.raises(UserError, match='no column "possible_answers": .* columns are id, question, answers_of_it'):
        questions(open_source("popqa"), "test")


def test_names_of_the_hub():
    assert find_hub_set("triviaqa")[0] == "triviaqa/rc.wikipedia"
    assert find_hub_set("triviaqa/unfiltered.nocontext")[1].configuration == "unfiltered.nocontext"
    assert find_hub_set("rajpurkar/squad") == ("squad", HUB_SETS["squad"])
    assert find_hub_set("wikimedia/wikipedia/20231101.de")[0] == "wikipedia/20231101.de"
    assert find_hub_set("squad2") is None and find_hub_set("hotpot") is None
