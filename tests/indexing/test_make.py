"""An index from beginning to end: built, resumed after SIGKILL at every stage, mended, refused, and used.

Run as a program (see `worker`), this file builds in a process of its own, which some tests kill. There the embedder is
a stand-in, so that a process takes a second.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ragjax.config import IndexConfig
from ragjax.costs import ModelSize
from ragjax.data import Dataset
from ragjax.data.passages import PassageList
from ragjax.data.questions import Passage, Question
from ragjax.errors import UserError
from ragjax.indexing import make as module
from ragjax.indexing import needs as needs_module
from ragjax.retrieval import encode, open_index, read_index_record
from ragjax.retrieval.retriever import Queries, Retriever
from tests.retrieval.cases import all_of, brute_force

COUNT, WIDTH, ROWS, SHARDS = 300, 8, 64, 5


class Standin:
    """An embedder whose vectors follow from the number that a text begins with."""

    def __init__(self, **record):
        self.passage_record = {
            "sha256": "standin",
            "weights": "w",
            "max_seq_length": 4,
            "dtype": "float32",
            "passage_prefix": "",
        } | record
        self.width, self.size = WIDTH, ModelSize(10, 0, 0, 1, WIDTH)
        self.encoded = []

    def describe(self):
        return "a stand-in"

    def passage_tokens(self, passages):
        return [[int(text.split()[0])] for text in passages]

    def encode_tokens(self, tokens, *, advance=None):
        self.encoded.append([each[0] for each in tokens])
        return vectors_of([each[0] for each in tokens])

    def encode_passages(self, texts):
        return vectors_of([int(text.split()[0]) for text in texts])

    encode_queries = encode_passages


def vectors_of(numbers):
    found = np.sin(np.outer(np.asarray(numbers) + 1.0, np.arange(1, WIDTH + 1) ** 1.5))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def dataset_of(texts=None, dev=20):
    texts = texts or [f"{row} text" for row in range(COUNT)]
    questions = [Question(f"q{row}", f"{row + 1000} asked", ("a",), ()) for row in range(dev)]
    passages = PassageList([Passage(f"p{row}", f"{row} title", text) for row, text in enumerate(texts)])
    # The text that is embedded begins with the title.
    return Dataset("data", Path("data"), passages, [], questions, [], sha256="d")


def config_of(folder, **changes):
    return IndexConfig(index_dir=str(folder), **{"index": "IVF4,Flat", "nprobe": 2} | changes)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(encode, "ROWS", ROWS)


def build(folder, embedder=None, dataset=None, **changes):
    return module.index_dataset(config_of(folder, **changes), dataset or dataset_of(), embedder or Standin())


def identity(embedder=None, dataset=None):
    return encode.identity_of(embedder or Standin(), (dataset or dataset_of()).passages)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An index that was built without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "ROWS", ROWS)
        build(folder)
    return folder


def bytes_of(folder):
    files = [*folder.glob("vectors/*.npy"), folder / "index.faiss"]
    return {path.name: path.read_bytes() for path in files}


def lasting(folder):
    """index.json without seconds and times."""
    value = json.loads((folder / "index.json").read_text())
    value["seal"] = value["seal"]["sha256"]
    for line in value["recall"]["measured"]:
        del line["questions_per_second"]
    return {**value, "cost": value["cost"]["encode"]["tokens"]}


def test_what_stands_in_the_folder(whole):
    assert sorted(path.name for path in whole.iterdir()) == [".lock", "index.faiss", "index.json", "vectors"]
    record = read_index_record(whole)
    assert (record.factory, record.nprobe, record.train_sample) == ("IVF4,Flat", 2, COUNT)
    assert record.metric == "inner_product"
    assert record.vectors == identity()
    assert set(record.versions) == {"ragjax", "faiss", "numpy"}
    vectors, index = open_index(whole, identity())
    np.testing.assert_array_equal(all_of(vectors), vectors_of(range(COUNT)))
    assert index.describe() | {"faiss": ""} == {
        "type": "IVF4,Flat", "nprobe": 2, "lists": 4, "faiss": "", "passages": COUNT, "width": WIDTH
    }  # fmt: skip


def test_recall_is_the_share_of_the_nearest_that_is_found(whole):
    """Against a full sort in float64, for each of the numbers of lists that were tried."""
    record, asked = read_index_record(whole), vectors_of(range(1000, 1020))
    assert (record.recall["questions"], record.recall["from"]) == (20, "dev questions")
    nearest = brute_force(vectors_of(range(COUNT)), asked, 10)[0]
    assert [line["nprobe"] for line in record.recall["measured"]] == [1, 2, 4]
    for line in record.recall["measured"]:
        vectors, index = open_index(whole, identity(), line["nprobe"])
        found = Retriever(index, vectors).retrieve(Queries(["x"] * 20, asked), 10).passage_rows
        for k in (5, 10):
            shared = [len(set(a[:k]) & set(b[:k])) / k for a, b in zip(found.tolist(), nearest.tolist(), strict=True)]
            assert line[f"recall_at_{k}"] == pytest.approx(np.mean(shared))
    assert record.recall["measured"][-1]["recall_at_10"] == 1.0 > record.recall["measured"][0]["recall_at_10"]


def test_without_dev_questions_titles_are_asked(tmp_path):
    record = build(tmp_path, dataset=dataset_of(dev=0))
    assert (record.recall["questions"], record.recall["from"]) == (COUNT, "titles of passages")


def test_a_finished_index_is_printed(whole, tmp_path, capsys):
    folder = tmp_path / "copied"
    shutil.copytree(whole, folder)
    before, embedder = (folder / "index.json").read_bytes(), Standin()
    build(folder, embedder)
    out = capsys.readouterr().out
    assert embedder.encoded == [] and "left to do" not in out
    assert "IVF4,Flat over 300 passages of data, by a stand-in" in out and "--nprobe=2, which is its default" in out
    assert out.endswith(f"Next:\n  python -m ragjax.train --index_dir={folder}\n")
    build(folder, embedder, data="/the data", passage_prefix="passage: ")
    flags = f"--data='/the data' --index_dir={folder} --passage_prefix='passage: '"
    assert capsys.readouterr().out.endswith(f"ragjax.train {flags}\n")  # what a run has to be told, too
    assert (folder / "index.faiss").stat().st_ino  # untouched
    assert json.loads(before)["recall"] == json.loads((folder / "index.json").read_bytes())["recall"]


def test_flat_needs_no_file_and_compares_all(tmp_path):
    record = build(tmp_path, index="Flat", nprobe=0)
    assert record.seal is None and not (tmp_path / "index.faiss").exists()
    vectors, index = open_index(tmp_path, identity())
    asked = vectors_of(range(2000, 2007))
    found = Retriever(index, vectors).retrieve(Queries(["x"] * 7, asked), 9)
    np.testing.assert_array_equal(found.passage_rows, brute_force(vectors_of(range(COUNT)), asked, 9)[0])
    with pytest.raises(UserError, match="--nprobe=3 goes with an index that has lists"):
        open_index(tmp_path, identity(), 3)


# ---- killed ------------------------------------------------------------------------------------------------


def worker(folder, stage):
    """Builds, and kills itself: in the second shard, while training, in mid-writing, before recall is measured."""
    die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    embedder = Standin()
    if stage == "encoding":
        encode_tokens = embedder.encode_tokens
        embedder.encode_tokens = lambda tokens, **k: die() if len(embedder.encoded) == 1 else encode_tokens(tokens, **k)
    elif stage == "training":
        module.train_index = die
    elif stage == "writing":
        write = module.write_index

        def write_half(index, path):
            if path.name != "index.faiss":
                return write(index, path)
            path.with_name("index.faiss.part").write_bytes(b"half")
            die()

        module.write_index = write_half
    elif stage == "measuring":
        module.measure_recall = die
    encode.ROWS = ROWS
    build(Path(folder), embedder)


def start(folder, stage):
    paths = [str(Path(module.__file__).parents[2]), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, __file__, str(folder), stage]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# Shards that the second run encodes.
STAGES = {"encoding": SHARDS - 1, "training": 0, "writing": 0, "measuring": 0}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder for each stage, left by a process that was killed there."""
    folder = tmp_path_factory.mktemp("killed")
    processes = {stage: start(folder / stage, stage) for stage in STAGES}
    for process in processes.values():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, errors
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_build_is_finished_with_the_same_bytes(killed, whole, stage, monkeypatch):
    folder, embedder, trained = killed / stage, Standin(), []
    with pytest.raises(UserError, match="is not finished" if stage != "measuring" else "another embedder"):
        open_index(folder, identity(Standin(sha256="x")))
    train = module.train_index
    monkeypatch.setattr(module, "train_index", lambda *given: trained.append(1) or train(*given))
    build(folder, embedder)
    assert len(embedder.encoded) == STAGES[stage]
    assert len(trained) == (stage in ("encoding", "training"))  # else the trained index was kept
    assert bytes_of(folder) == bytes_of(whole)
    assert lasting(folder) == lasting(whole)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "index.faiss", "index.json", "vectors"]


# ---- damaged, refused --------------------------------------------------------------------------------------


@pytest.fixture
def copied(whole, tmp_path):
    """The whole index, to be spoilt."""
    shutil.copytree(whole, tmp_path / "index")
    return tmp_path / "index"


@pytest.mark.parametrize("file", ["index.faiss", "vectors/00002.npy"])
def test_a_damaged_file_is_refused_and_mended(copied, whole, file, capsys):
    path = copied / file
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged: run python -m ragjax.index with this --index_dir"):
        open_index(copied, identity())
    embedder = Standin()
    build(copied, embedder)
    assert embedder.encoded == ([list(range(128, 192))] if file.startswith("vectors") else [])
    assert "damaged" in capsys.readouterr().err
    assert bytes_of(copied) == bytes_of(whole)
    open_index(copied, identity())


@pytest.mark.parametrize("file", ["index.faiss", "vectors/00002.npy"])
def test_verifying_mends_a_change_that_kept_size_and_time(copied, whole, file, capsys):
    path = copied / file
    status, data = path.stat(), bytearray(path.read_bytes())
    build(copied)  # whose record has the copies' times
    data[-5] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    build(copied)
    assert bytes_of(copied) != bytes_of(whole)
    capsys.readouterr()
    build(copied, verify=True)
    assert bytes_of(copied) == bytes_of(whole)
    assert f"verified: every file of {copied} was hashed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("embedder", "dataset", "sentence"),
    [
        ({"sha256": "other"}, None, r"was made with another embedder \(sha256 'standin', now 'other'\)"),
        ({"weights": "tuned"}, None, r"was made with other weights of the embedder \(weights 'w', now 'tuned'\)"),
        ({"max_seq_length": 9}, None, r"was made with another longest input \(max_seq_length '4', now '9'\)"),
        ({"passage_prefix": "p: "}, None, r"was made with another --passage_prefix \(passage_prefix '', now 'p: '\)"),
        (
            {},
            [f"{row} other" for row in range(COUNT)],
            r"was made of other passages \(300 of sha256 \w{12}, now 300",
        ),
    ],
)
def test_another_embedder_or_corpus_is_refused_by_name(whole, embedder, dataset, sentence):
    asked = Standin(**embedder), dataset_of(dataset)
    with pytest.raises(UserError, match=sentence):
        open_index(whole, identity(*asked))
    with pytest.raises(UserError, match=sentence):
        build(whole, *asked)
    begun = whole.parent / "begun"  # no index.json yet
    shutil.copytree(whole / "vectors", begun / "vectors", dirs_exist_ok=True)
    with pytest.raises(UserError, match=sentence):
        build(begun, *asked)


def test_an_embedder_of_another_dtype_may_ask(whole):
    """It is how questions are computed; how passages were stands in the record."""
    open_index(whole, identity(Standin(dtype="bfloat16")))
    with pytest.raises(UserError, match=r"holds vectors with --dtype=float32 \(now bfloat16\)"):
        build(whole, Standin(dtype="bfloat16"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"index": "HNSW8", "nprobe": 0}, r"--index=IVF4,Flat \(now HNSW8\)"),
        ({"train_sample": 200}, r"--train_sample=300 \(now 200\)"),
        ({"nprobe": 3}, r"--nprobe=2 \(now 3\)"),
        ({"vector_dtype": "bfloat16"}, r"--vector_dtype=float32 \(now bfloat16\)"),
        ({"index": "nonsense"}, "--index=nonsense is nothing that FAISS makes"),
        ({"index": "SQ8", "nprobe": 3}, "--nprobe=3 goes with an index that has lists"),
        ({"index_dir": ""}, "--index_dir is needed"),
    ],
)
def test_other_flags_are_refused(whole, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        if "index_dir" in changes:
            module.make_index(IndexConfig())
        else:
            build(whole, **changes)


def test_another_index_over_the_same_vectors(copied):
    embedder = Standin()
    for factory in ("SQ8", "Flat"):
        (copied / "index.json").unlink()
        assert build(copied, embedder, index=factory, nprobe=0).factory == factory
        assert (copied / "index.faiss").exists() == (factory == "SQ8")
    assert embedder.encoded == []


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({}, "there are 300 vectors to train them on: ask for at most 300 lists or choose"),
        ({"train_sample": 200}, "raise"),
    ],
)
def test_more_lists_than_vectors_are_refused_before_anything_is_encoded(tmp_path, changes, mend):
    embedder = Standin()
    with pytest.raises(UserError, match=f"--index=IVF4096,Flat has 4,096 lists.*{mend}"):
        build(tmp_path, embedder, index="IVF4096,Flat", nprobe=0, **changes)
    assert embedder.encoded == []


def test_more_lists_than_there_are_mean_all(tmp_path):
    for _ in range(2):  # the same command again is no other index
        assert build(tmp_path, nprobe=99).nprobe == 4


def test_a_second_process_is_refused(copied):
    (copied / "index.json").unlink()
    with module._held(copied), pytest.raises(UserError, match="Another process is working on .*: wait for it"):
        build(copied)


def test_no_index_there(tmp_path):
    with pytest.raises(UserError, match="holds no index: run python -m ragjax.index"):
        open_index(tmp_path, identity())
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(UserError, match="does not describe an index of this version"):
        open_index(tmp_path, identity())


# ---- what it takes -----------------------------------------------------------------------------------------


def test_a_dry_run_prints_what_is_needed_and_writes_nothing(tmp_path, capsys):
    assert build(tmp_path / "new", dry_run=True) is None
    assert not (tmp_path / "new").exists()
    out = capsys.readouterr().out
    assert "300 passages at" in out and "GB of disk" in out and "GB of memory" in out


def test_needs_count_what_is_missing(copied, capsys):
    (copied / "index.json").unlink()
    (copied / "vectors" / "00001.npy").unlink()
    build(copied, dry_run=True)
    assert "64 passages at" in capsys.readouterr().out


def test_a_disk_without_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=9000))
    # 300 vectors of 8 float32 are 9,600 bytes; the index holds them once more, with 8 bytes each, and 4 centres.
    with pytest.raises(UserError, match=r"needs 2.17e-05 GB in .*, where 9e-06 GB are free: .*--vector_dtype=bfloat16"):
        build(tmp_path / "new")
    assert not list((tmp_path / "new").glob("vectors/*.npy"))


def test_memory_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(needs_module, "available_memory", lambda: 10_000)
    with pytest.raises(UserError, match=r"needs about .* GB of memory, and 1e-05 GB are free: .*--index=Flat"):
        build(tmp_path / "new")


def test_free_memory_is_that_of_the_system():
    found = needs_module.available_memory()
    if not Path("/proc/meminfo").exists():
        pytest.skip("a system that does not tell")
    assert 1e6 < found < 1e14


def test_the_rate_is_of_passages_over_the_whole_corpus(monkeypatch):
    embedder, asked = Standin(), []
    embedder.encode_passages = lambda texts: asked.append([int(text.split()[0]) for text in texts])
    clock = iter([0.0, 0.1, 1.0, 1.5])  # 32 passages in 0.1 s, 128 in 0.5 s
    monkeypatch.setattr(needs_module.time, "perf_counter", lambda: next(clock))
    assert needs_module._rate(embedder, dataset_of().passages) == pytest.approx(256)
    assert [len(texts) for texts in asked] == [32, 32, 128, 128]
    assert asked[-1][0] == 0 and asked[-1][-1] > 290


if __name__ == "__main__":
    worker(*sys.argv[1:])
