"""ragjax.files: atomic writes of files and folders, JSON, hashes, records by key."""

import errno
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ragjax.errors import UserError
from ragjax.files import (
    KeyedRecords,
    PlannedFile,
    default_cache_dir,
    plan_copy,
    plan_json,
    plan_text,
    read_json,
    read_json_lines,
    read_json_object,
    read_pieces,
    sha256_file,
    write_atomic,
    write_folder,
    write_json,
)


def test_written_bytes_and_text_come_back(tmp_path):
    write_atomic(tmp_path / "new" / "a.bin", b"\x00\xff")
    write_atomic(str(tmp_path / "b.txt"), "naïve\n")
    assert (tmp_path / "new" / "a.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b.txt").read_bytes() == b"na\xc3\xafve\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.txt", "new"]


@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path, monkeypatch, step):
    path = tmp_path / "summary.json"
    path.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, {"write": "fsync", "replace": "replace"}[step], full)
    with pytest.raises(UserError, match="summary.json could not be written .*No space left.*free some space"):
        write_atomic(path, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("summary.json", "old")]


def test_a_reader_never_sees_a_part(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append(path.read_text()), replace(*names)))
    write_atomic(path, "new")
    assert (seen, path.read_text()) == (["old"], "new")


def test_sha256_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "a"
    content = bytes(range(256)) * 5000
    path.write_bytes(content)
    assert sha256_file(path) == hashlib.sha256(content).hexdigest()
    path.write_bytes(b"")  # the well-known hash of nothing
    assert sha256_file(path) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    with pytest.raises(UserError, match="absent"):
        sha256_file(tmp_path / "absent")


def test_json_round_trip_keeps_order_and_text(tmp_path):
    value = {"b": [1, 2.5, None], "a": "Zürich"}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text == '{\n  "b": [\n    1,\n    2.5,\n    null\n  ],\n  "a": "Zürich"\n}\n'
    assert read_json(tmp_path / "a.json") == value


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b'{"a": ', b'{"a": "\xff"}', b"[1] 2"])
def test_bad_json_names_the_file(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        read_json(tmp_path / "config.json")


def test_missing_json_names_the_file(tmp_path):
    with pytest.raises(UserError, match="absent.json could not be read"):
        read_json(tmp_path / "absent.json")


def test_json_lines_end_at_newlines_alone(tmp_path):
    """With or without a last one, and with characters that end lines elsewhere."""
    (tmp_path / "a.jsonl").write_bytes('{"a": "one\u2028two\x85"}\r\n[3]'.encode())
    assert read_json_lines(tmp_path / "a.jsonl") == [{"a": "one\u2028two\x85"}, [3]]
    (tmp_path / "b.jsonl").write_bytes(b"")
    assert read_json_lines(tmp_path / "b.jsonl") == []
    (tmp_path / "c.jsonl").write_bytes(b"1\n2\n\xe9\n")
    with pytest.raises(UserError, match=r"c\.jsonl line 3 is not valid JSON"):
        read_json_lines(tmp_path / "c.jsonl")


def test_an_object_is_asked_for(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    write_json(tmp_path / "b.json", ["a"])
    assert read_json_object(tmp_path / "a.json") == {"a": 1}
    with pytest.raises(UserError, match="b.json does not hold a JSON object"):
        read_json_object(tmp_path / "b.json")


def test_default_cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("RAGJAX_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.setenv("RAGJAX_CACHE", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_cache_dir() == Path("/home/somebody/.cache/ragjax")


# ---- folders -----------------------------------------------------------------------------------------------


def planned(path: str, data: bytes) -> PlannedFile:
    return PlannedFile(path, len(data), lambda: [data[:2], memoryview(data[2:])])


def test_a_folder_is_written_with_all_its_files(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"copied")
    files = [plan_text("a/text", "Ä\n"), plan_json("a/b/value.json", {"x": [1]}), plan_copy("copy", source)]
    write_folder(tmp_path / "new" / "folder", [*files, planned("bytes", b"12345")])
    folder = tmp_path / "new" / "folder"
    assert (folder / "a" / "text").read_text(encoding="utf-8") == "Ä\n"
    assert read_json(folder / "a" / "b" / "value.json") == {"x": [1]}
    assert (folder / "copy").read_bytes() == b"copied"
    assert (folder / "bytes").read_bytes() == b"12345"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "broken link"])
def test_what_exists_is_not_written_over(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "folder":
        (target / "inside").mkdir(parents=True)
    elif kind == "empty folder":
        target.mkdir()
    elif kind == "file":
        target.touch()
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already: choose another folder"):
        write_folder(target, [planned("a", b"new")])
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_asks_for_its_room_first(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=9))
    with pytest.raises(UserError, match="needs 10 bytes, and 9 are free"):
        write_folder(tmp_path / "folder", [planned("a", b"12345"), planned("b", b"12345")])
    assert list(tmp_path.iterdir()) == []
    write_folder(tmp_path / "folder", [planned("a", b"123456789")])


def test_a_disk_that_fills_up_leaves_no_folder(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match="folder could not be written"):
            write_folder(tmp_path / "folder", [planned("a", b"1"), planned("b", bytes(20_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_length_than_planned_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="a has 3 bytes where 4 were planned"):
        write_folder(tmp_path / "folder", [PlannedFile("a", 4, lambda: [b"123"])])
    with pytest.raises(UserError, match="became shorter"):
        write_folder(tmp_path / "folder", [PlannedFile("a", 99, lambda: read_pieces(Path(__file__), 10**7, 99))])
    assert list(tmp_path.iterdir()) == []


KILLED_HALF_WAY = """
import os, signal, sys
from ragjax.files import PlannedFile, write_folder

def pieces():
    yield b"12"
    os.kill(os.getpid(), signal.SIGKILL)

write_folder(sys.argv[1], [PlannedFile("a", 4, lambda: [b"full"]), PlannedFile("b", 4, pieces)])
"""


def test_a_killed_process_leaves_no_folder_and_the_next_one_clears_up(tmp_path):
    target = tmp_path / "folder"
    done = subprocess.run([sys.executable, "-c", KILLED_HALF_WAY, str(target)], timeout=300)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name == ".folder.ragjax-part"
    assert (left / "a").exists()
    write_folder(target, [planned("b", b"1234")])
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in target.iterdir()] == ["b"]


def test_two_processes_do_not_write_one_folder(tmp_path):
    def pieces():
        with pytest.raises(UserError, match="another process is writing"):
            write_folder(tmp_path / "folder", [planned("b", b"mine")])
        yield b"yours"

    write_folder(tmp_path / "folder", [PlannedFile("a", 5, pieces)])
    assert (tmp_path / "folder" / "a").read_bytes() == b"yours"
    assert not (tmp_path / "folder" / "b").exists()


# ---- records by key ----------------------------------------------------------------------------------------


def three_lines(path: Path) -> KeyedRecords:
    records = KeyedRecords(path)
    records.add({"a": [1.0], "b": [2.0, 3.0]})
    records.add({"c": []})
    records.add({"d": [4.0]})
    return records


def test_records_come_back_as_they_were(tmp_path):
    """Float32 values bit for bit, in this process and in the next."""
    values = np.random.default_rng(0).standard_normal(50).astype(np.float32) * np.float32(10.0) ** np.arange(-25, 25)
    path = tmp_path / "new" / "records.jsonl"
    records = KeyedRecords(path)
    assert "a" not in records and (len(records), records.lines) == (0, 0)
    records.add({"a": values.astype(np.float32).tolist()})
    for found in (records, KeyedRecords(path)):
        assert "a" in found and "b" not in found
        np.testing.assert_array_equal(np.asarray(found["a"], np.float32), values.astype(np.float32))


def test_rewinding_keeps_the_first_lines(tmp_path):
    path = tmp_path / "records.jsonl"
    records = three_lines(path)
    content = path.read_text()
    assert (records.lines, len(records)) == (3, 4)
    for lines in (5, 3):
        records.rewind(lines)
        assert (records.lines, path.read_text()) == (3, content)
    records.rewind(1)
    for found in (records, KeyedRecords(path)):
        assert ["a" in found, "b" in found, "c" in found, "d" in found] == [True, True, False, False]
        assert found.lines == 1
    records.add({"c": []})
    records.add({"d": [4.0]})
    assert path.read_text() == content
    records.rewind(0)
    assert (records.lines, len(records), path.read_text()) == (0, 0, "")


@pytest.mark.parametrize("missing", [1, 2, 9])
def test_a_record_that_was_cut_off_is_dropped_with_its_line(tmp_path, missing):
    path = tmp_path / "records.jsonl"
    three_lines(path)
    path.write_text(path.read_text()[:-missing])
    records = KeyedRecords(path)
    assert ("c" in records, "d" in records, records.lines) == (True, False, 2)
    records.add({"e": [5.0]})
    assert ("c" in (found := KeyedRecords(path)), found["e"], found.lines) == (True, [5.0], 3)


@pytest.mark.parametrize("damaged", [b"{", b"", b"[1]", b"7", b"\xff\xfe", b'{"c" []}'])
def test_damaged_records_name_the_file(tmp_path, damaged):
    path = tmp_path / "records.jsonl"
    three_lines(path)
    first, _, last = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, damaged, last, b""]))
    content = path.read_bytes()
    with pytest.raises(UserError, match=r"records\.jsonl is damaged \(.*delete it, and it will be created again"):
        KeyedRecords(path)
    assert path.read_bytes() == content


def test_records_on_a_full_disk_are_not_kept(tmp_path):
    path = tmp_path / "records.jsonl"
    records = three_lines(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        with pytest.raises(UserError, match="records.jsonl could not be written"):
            records.add({"e": [0.5] * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for found in (records, KeyedRecords(path)):
        assert ("e" in found, "d" in found, found.lines) == (False, True, 3)
