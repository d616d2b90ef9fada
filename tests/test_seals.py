"""Files that are hashed when written, and again only where size or time say that they may have changed."""

import dataclasses
import os

import pytest

from ragjax.errors import UserError
from ragjax.files import Seal, seals


@pytest.fixture
def hashed(monkeypatch):
    """The files that were hashed."""
    found = []
    real = seals.sha256_file
    monkeypatch.setattr(seals, "sha256_file", lambda path: found.append(path) or real(path))
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "vectors"
    path.write_bytes(b"abc")
    return path


def test_an_untouched_file_is_not_read(file, hashed):
    seal = Seal.of(file)
    assert seal.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2's own case
    hashed.clear()
    assert seal.renewed(file.parent) is seal and hashed == []
    assert seal.renewed(file.parent, verify=True) == seal and hashed == [file]
    assert Seal.read(seal.as_json()) == seal


def test_a_copied_file_is_hashed_once(file, hashed):
    seal = Seal.of(file)
    os.utime(file, ns=(1, 1))
    hashed.clear()
    renewed = seal.renewed(file.parent)
    assert renewed == dataclasses.replace(seal, mtime_ns=1) and hashed == [file]
    assert renewed.renewed(file.parent) is renewed and hashed == [file]


@pytest.mark.parametrize("content", [b"ab", b"abcd", b"abd"])
def test_other_bytes_break_it(file, content):
    seal = Seal.of(file)
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    assert seal.renewed(file.parent) is None


def test_only_verifying_finds_a_change_that_kept_size_and_time(file):
    seal = Seal.of(file)
    file.write_bytes(b"abd")
    os.utime(file, ns=(seal.mtime_ns, seal.mtime_ns))
    assert seal.renewed(file.parent) is seal
    assert seal.renewed(file.parent, verify=True) is None


def test_a_missing_file_and_no_seal(file):
    seal = Seal.of(file)
    file.unlink()
    with pytest.raises(UserError, match="vectors could not be read"):
        seal.renewed(file.parent)
    for value in ({}, {**seal.as_json(), "bytes": "3"}, {**seal.as_json(), "more": 1}):
        with pytest.raises(TypeError):
            Seal.read(value)
