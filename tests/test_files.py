"""ragjax.files: atomic writes, JSON, hashes."""

import errno
import hashlib
import os

import pytest

from ragjax.errors import UserError
from ragjax.files import read_json, read_json_object, sha256_file, write_atomic, write_json


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


def test_an_object_is_asked_for(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    write_json(tmp_path / "b.json", ["a"])
    assert read_json_object(tmp_path / "a.json") == {"a": 1}
    with pytest.raises(UserError, match="b.json does not hold a JSON object"):
        read_json_object(tmp_path / "b.json")
