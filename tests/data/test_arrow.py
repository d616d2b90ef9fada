"""The store on disk against the one in memory, and what it says of damage."""

import json
import mmap
import os
import shutil

import numpy as np
import pytest

from ragjax.data import arrow as module
from ragjax.data.arrow import ArrowStore, ArrowWriter, is_arrow_store
from ragjax.data.passages import PassageList, PassageStore
from ragjax.data.questions import Passage
from ragjax.errors import UserError
from tests.mapped import resident

PASSAGES = [
    Passage(f"p{i}", "" if i % 3 else f"Titel {i} é", f"text {i} \u2028 日本語 " + "x" * (i % 7)) for i in range(50)
]


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Seven files of up to two batches."""
    monkeypatch.setattr(module, "SHARD", 8)
    monkeypatch.setattr(module, "_BATCH", 4)


def written(folder, passages=PASSAGES):
    writer = ArrowWriter(folder)
    for i, passage in enumerate(passages):
        writer.add(passage, f"d{i // 5}" if i % 2 else "", i)
    assert len(writer) == len(passages)
    return writer.finish()


@pytest.fixture
def store(tmp_path):
    return written(tmp_path / "store")


def test_it_is_the_store_in_memory(store, tmp_path):
    memory = PassageList(PASSAGES)
    for opened in (store, ArrowStore(tmp_path / "store"), ArrowStore(tmp_path / "store", verify=True)):
        assert isinstance(opened, PassageStore)
        assert len(opened) == 50 and list(opened) == list(opened) == PASSAGES
        assert [opened[row] for row in range(50)] == PASSAGES
        assert opened[np.int64(49)] == PASSAGES[49]
        assert (opened.content_hash, opened.records_hash) == (memory.content_hash, memory.records_hash)
        ids = ["p49", "p0", "p17", "p17"]
        assert opened.rows_of(ids).tolist() == [49, 0, 17, 17] and opened.rows_of([]).dtype == np.int64
        assert opened.ids_of(np.array([49, 0, 17])) == ["p49", "p0", "p17"]
        assert "p3" in opened and "p50" not in opened and 3 not in opened
        assert opened.origin(3) == ("d0", 3) and opened.origin(4) == ("", 4)
    assert is_arrow_store(tmp_path / "store") and not is_arrow_store(tmp_path)
    assert len(list((tmp_path / "store").glob("passages-*.arrow"))) == 7


def test_reading_passage_after_passage_takes_no_more_memory(store, monkeypatch):
    """Pages go back after every few passages, in whatever way those are read, and what is read then is the same."""
    assert store[0] == PASSAGES[0] and resident(store.folder) > 0
    monkeypatch.setattr(module, "_HELD", 10)
    for _ in range(9):
        assert store[49] == PASSAGES[49]
    assert resident(store.folder) == 0
    read = iter(store)
    assert [next(read) for _ in range(50)] == PASSAGES
    assert 0 < resident(store.folder) <= 3 * mmap.PAGESIZE  # of the last two batches


def test_what_it_does_not_have(store):
    with pytest.raises(KeyError, match="nowhere"):
        store.rows_of(["p1", "nowhere"])
    for row in (-1, 50):
        with pytest.raises(IndexError, match=f"0 to 49, not {row}"):
            store[row]


def test_ids_whose_hashes_collide(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_key", lambda identity: int(identity[1:]) % 3)
    store = written(tmp_path / "store")
    assert store.rows_of([passage.id for passage in PASSAGES]).tolist() == list(range(50))
    assert "p51" not in store
    with pytest.raises(UserError, match='passages 2 and 51 have the same id "p1"'):
        written(tmp_path / "twice", [*PASSAGES, Passage("p1", "", "again")])


def test_an_id_that_occurs_twice(tmp_path):
    with pytest.raises(UserError, match='passages 8 and 51 have the same id "p7": give every passage'):
        written(tmp_path / "store", [*PASSAGES, Passage("p7", "", "again")])
    assert not is_arrow_store(tmp_path / "store")


def test_long_texts_are_not_held_back(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LONGEST", 10)
    monkeypatch.setattr(module, "_BATCH", 1000)
    assert list(written(tmp_path / "store")) == PASSAGES
    assert len(list((tmp_path / "store").glob("passages-*.arrow"))) > 1


def test_no_passages_and_no_characters(tmp_path):
    with pytest.raises(UserError, match="no passages"):
        ArrowWriter(tmp_path / "empty").finish()
    with pytest.raises(UserError, match="id 'p' holds half of a surrogate pair"):
        ArrowWriter(tmp_path / "half").add(Passage("p", "", "\ud800"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        ArrowWriter(tmp_path / "file")


def test_a_damaged_file_is_named(store, tmp_path):
    for name in ("passages-00003.arrow", "ids.keys.npy", "ids.rows.npy"):
        folder = tmp_path / f"with {name}"
        shutil.copytree(store.folder, folder)
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name} is not what was written: prepare the data again"):
            ArrowStore(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"{name} could not be read"):
            ArrowStore(folder)


def test_a_change_that_hides_is_found_when_asked(store):
    path = store.folder / "passages-00000.arrow"
    before, data = path.stat(), bytearray(path.read_bytes())
    data[data.index(b"text 3")] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ArrowStore(store.folder)[3].text.startswith("uext 3")
    with pytest.raises(UserError, match="is not what was written"):
        ArrowStore(store.folder, verify=True)


def test_a_copy_is_hashed_once(store, tmp_path, monkeypatch):
    shutil.copytree(store.folder, tmp_path / "copy", copy_function=shutil.copy)
    assert list(ArrowStore(tmp_path / "copy")) == PASSAGES
    monkeypatch.setattr("ragjax.files.seals.sha256_file", lambda path: pytest.fail("hashed again"))
    ArrowStore(tmp_path / "copy")


@pytest.mark.parametrize(
    "change", [{"layout": 0}, {"passages": 0}, {"content_hash": None}, {"shards": [{}]}, {"ids": None}]
)
def test_a_damaged_record(store, change):
    path = store.folder / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="prepare the data again"):
        ArrowStore(store.folder)


def test_opening_reads_no_passages(tmp_path, monkeypatch):
    """What is resident after opening does not grow with the corpus."""
    import pyarrow as pa

    store = written(tmp_path / "store", [Passage(f"p{i}", "", "x" * 10_000) for i in range(200)])
    before = pa.total_allocated_bytes()
    opened = ArrowStore(store.folder)
    assert pa.total_allocated_bytes() - before < 50_000
    assert opened[150].text == "x" * 10_000
