"""The vectors on disk: right rows, one encoding, resumed after SIGKILL, never damaged without notice.

Run as a program (see `worker`), this file encodes in a process of its own, which some tests kill.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ragjax.data.passages import PassageList
from ragjax.data.questions import Passage
from ragjax.errors import UserError
from ragjax.files import seals
from ragjax.retrieval import encode as module
from ragjax.retrieval import shards
from ragjax.retrieval.encode import (
    Place,
    cached_vectors,
    encode_corpus,
    forget_changed,
    identity_of,
    missing_passages,
    open_vectors,
)
from tests.mapped import resident
from tests.retrieval.cases import all_of

COUNT, WIDTH, ROWS = 50, 6, 8
SHARDS = 7
# Lengths go up and down within a shard.
TEXTS = [f"{row} " + "word " * (row * 7 % 13) for row in range(COUNT)]


def vectors_of(texts):
    """The vector of a text, [n, WIDTH], from its number alone."""
    rows = np.array([int(text.split()[0]) for text in texts])
    return np.sin(np.arange(1, WIDTH + 1) * (rows[:, None] + 1)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "ROWS", ROWS)


class Encoder:
    """Tokens of a text are its number and its words' lengths; counts what it is asked for."""

    def __init__(self, record=None, width=WIDTH):
        self.tokenised, self.encoded = [], []
        self.passage_record = record or {"sha256": "mini", "max_seq_length": 4}
        self.width = width

    def passage_tokens(self, passages):
        self.tokenised.append(list(passages))
        return [[int(text.split()[0]), *map(len, text.split()[1:])] for text in passages]

    def encode_tokens(self, tokens, *, advance=None):
        self.encoded.append([each[0] for each in tokens])
        advance(len(tokens))
        return vectors_of([str(each[0]) for each in tokens])


def store_of(texts):
    return PassageList([Passage(f"p{row}", "", text) for row, text in enumerate(texts)])


def run(cache_dir, encoder=None, texts=TEXTS):
    return cached_vectors(encoder or Encoder(), store_of(texts), cache_dir, show_progress=False)


def the_folder(cache_dir):
    (folder,) = [path for path in cache_dir.iterdir() if path.is_dir()]
    return folder


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


def test_vectors_stand_in_the_order_of_the_texts(tmp_path):
    encoder = Encoder()
    found = run(tmp_path, encoder)
    np.testing.assert_array_equal(all_of(found), vectors_of(TEXTS))
    assert (len(found), found.width) == (COUNT, WIDTH)
    assert found.longest == pytest.approx(np.linalg.norm(vectors_of(TEXTS), axis=1).max())
    assert found.tokens == sum(len(text.split()) for text in TEXTS) and found.seconds > 0
    assert [len(call) for call in encoder.encoded] == [ROWS] * 6 + [2]


def test_each_text_is_tokenised_once(tmp_path):
    encoder = Encoder()
    run(tmp_path, encoder)
    assert [text for call in encoder.tokenised for text in call] == TEXTS


@pytest.mark.parametrize("rows", [[0], [49, 0, 7, 8, 8, 31], np.array([[3, 47], [16, 15]]), np.zeros((2, 0), int)])
def test_rows_cross_shards(tmp_path, rows):
    np.testing.assert_array_equal(run(tmp_path).vectors_of(rows), vectors_of(TEXTS)[np.asarray(rows)])


@pytest.mark.parametrize("rows", [[-1], [3, COUNT]])
def test_rows_outside_are_refused(tmp_path, rows):
    found = run(tmp_path)
    with pytest.raises(IndexError, match="0 to 49"):
        found.vectors_of(rows)


def test_pages_that_were_read_are_given_back(tmp_path, monkeypatch):
    """What is read afterwards is the same, over few mapped shards at once as well."""
    found, given_back = run(tmp_path), []
    monkeypatch.setattr(shards, "_HELD", 10)
    monkeypatch.setattr(shards, "_MAPPED", 3)
    give_back = found._give_back
    monkeypatch.setattr(found, "_give_back", lambda: given_back.append(len(found._mapped)) or give_back())
    for rows in ([0, 9, 17, 25], [33, 41, 49, 1], [2, 3, 4], list(range(COUNT))):
        np.testing.assert_array_equal(found.vectors_of(rows), vectors_of(TEXTS)[rows])
    assert len(given_back) == 2 and max(given_back) <= 3


def test_reading_row_after_row_takes_no_more_memory(tmp_path):
    found = run(tmp_path)
    for _ in range(100):
        found.vectors_of([0, 1, 2])
    assert resident(tmp_path) > 0
    found._give_back()
    assert resident(tmp_path) == 0


def test_the_second_time_nothing_is_encoded_or_hashed(tmp_path, monkeypatch):
    first = run(tmp_path)
    monkeypatch.setattr(seals, "sha256_file", lambda path: pytest.fail(f"{path} is read"))
    encoder = Encoder()
    second = run(tmp_path, encoder)
    assert encoder.encoded == []
    assert (second.seconds, second.tokens, second.sha256) == (first.seconds, first.tokens, first.sha256)
    np.testing.assert_array_equal(all_of(second), vectors_of(TEXTS))


def test_a_copied_folder_is_hashed_once(tmp_path, monkeypatch):
    run(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy)  # with new times
    hashed, real = [], seals.sha256_file
    monkeypatch.setattr(seals, "sha256_file", lambda path: hashed.append(path) or real(path))
    for _ in range(2):
        np.testing.assert_array_equal(all_of(run(tmp_path / "b", Encoder())), vectors_of(TEXTS))
    assert len(hashed) == SHARDS


def test_bfloat16_is_rounded_to_nearest_and_takes_half(tmp_path):
    encoder, store = Encoder(), store_of(TEXTS)
    identity = identity_of(encoder, store, "bfloat16")
    found = encode_corpus(encoder, store, Place(tmp_path), identity, show_progress=False)
    whole = vectors_of(TEXTS)
    # Eight bits of mantissa: the nearest of them is at most half a step away, a step being 2^-8 of the power of two.
    step = 2.0 ** (np.floor(np.log2(np.abs(whole))) - 7)
    assert (np.abs(all_of(found) - whole) <= step / 2).all()
    assert (np.mod(all_of(found) / step, 1) == 0).all()
    assert np.load(tmp_path / "00000.npy", allow_pickle=False).dtype == np.uint16
    assert json.loads((tmp_path / "shards.json").read_text())["dtype"] == "bfloat16"


def test_every_part_of_the_key_counts(tmp_path):
    run(tmp_path)
    others = [
        {"encoder": Encoder({"sha256": "other"})},
        {"texts": TEXTS[:-1]},
        {"texts": TEXTS[::-1]},
        {"texts": ["49 moved", *TEXTS[1:]]},
        {"texts": ["1", "23"]},
        {"texts": ["12", "3"]},
    ]
    for other in others:
        encoder = other.get("encoder") or Encoder()
        found = run(tmp_path, encoder, other.get("texts", TEXTS))
        assert encoder.encoded
        np.testing.assert_array_equal(all_of(found), vectors_of(other.get("texts", TEXTS)))
    encoder = Encoder()
    run(tmp_path, encoder)
    assert encoder.encoded == []


@pytest.mark.parametrize("damage", ["flipped bit", "cut off", "gone", "other shape"])
def test_a_damaged_shard_is_encoded_again_and_no_other(tmp_path, damage, capsys):
    run(tmp_path)
    folder = the_folder(tmp_path)
    whole, path = bytes_of(folder), folder / "00003.npy"
    data = bytearray(path.read_bytes())
    if damage == "flipped bit":
        data[-3] ^= 4
        path.write_bytes(data)
        os.utime(path, ns=(1, 1))
    elif damage == "cut off":
        path.write_bytes(data[:-100])
    elif damage == "gone":
        path.unlink()
    else:
        np.save(path, np.zeros((ROWS, WIDTH + 1), np.float32))
    encoder = Encoder()
    found = run(tmp_path, encoder)
    assert encoder.encoded == [list(range(24, 32))]
    assert f"{path} are damaged: encoding those passages again" in capsys.readouterr().err
    np.testing.assert_array_equal(all_of(found), vectors_of(TEXTS))
    assert bytes_of(folder) == whole
    run(tmp_path, encoder)
    assert len(encoder.encoded) == 1


def test_verifying_finds_a_change_that_kept_size_and_time(tmp_path):
    found = run(tmp_path)
    path = found.folder / "00002.npy"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    assert open_vectors(found.folder, found.identity) is not None
    forget_changed(found.folder)
    assert open_vectors(found.folder, found.identity) is None
    assert missing_passages(found.folder, found.identity) == ROWS


@pytest.mark.parametrize("record", [None, "{", '{"seconds": 1}'])
def test_without_its_record_all_is_encoded_again(tmp_path, record, capsys):
    run(tmp_path)
    path = the_folder(tmp_path) / "shards.json"
    path.unlink() if record is None else path.write_text(record)
    encoder = Encoder()
    np.testing.assert_array_equal(all_of(run(tmp_path, encoder)), vectors_of(TEXTS))
    assert len(encoder.encoded) == SHARDS
    assert "record of the vectors" in capsys.readouterr().err


def test_what_is_missing_is_counted(tmp_path):
    store, place = store_of(TEXTS), Place(tmp_path)
    identity = identity_of(Encoder(), store)
    assert missing_passages(tmp_path, identity) == COUNT
    encode_corpus(Encoder(), store, place, identity, show_progress=False)
    assert missing_passages(tmp_path, identity) == 0
    (tmp_path / "00001.npy").unlink()
    (tmp_path / "00006.npy").unlink()  # the last, of two
    assert missing_passages(tmp_path, identity) == ROWS + 2


def worker(cache_dir, log, mode):
    """Encodes TEXTS; each call of the encoder appends its texts' numbers to `log` as one line.

    mode says where the process kills itself: encode:N inside the N-th call of the encoder, write:N when the N-th
    shard's part is half written, record:N when its file is there and not yet recorded. "slow" runs through, taking its
    time.
    """
    place, _, number = mode.partition(":")
    write_record, write_array = module.write_record, np.lib.format.write_array
    encoder = Encoder()

    def die_at(step, count):
        if place == step and count == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    def encode_tokens(tokens, *, advance=None):
        die_at("encode", len(encoder.encoded) + 1)
        if place == "slow":
            time.sleep(0.05)
        with open(log, "a") as file:
            file.write(" ".join(str(each[0]) for each in tokens) + "\n")
        return Encoder.encode_tokens(encoder, tokens, advance=advance)

    def write_half(file, array, **options):
        if place == "write" and len(encoder.encoded) == int(number):
            file.write(array.tobytes()[:40])
            file.flush()
            die_at("write", int(number))
        write_array(file, array, **options)

    def record(folder, identity, shards):
        die_at("record", len(shards))
        write_record(folder, identity, shards)

    encoder.encode_tokens = encode_tokens
    module.write_record, np.lib.format.write_array = record, write_half
    module.ROWS = ROWS
    run(Path(cache_dir), encoder)
    print(f"encoded={len(encoder.encoded)}")


def start(cache_dir, log, mode):
    """Starts `worker` on the ragjax that this test imports, from the tree or from a wheel."""
    paths = [str(Path(module.__file__).parents[2]), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, __file__, str(cache_dir), str(log), mode]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def calls_of(log):
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize(("mode", "encoded", "again"), [("encode:4", 3, 4), ("write:4", 4, 4), ("record:7", 7, 1)])
def test_a_killed_run_is_resumed_with_the_same_bytes(tmp_path, mode, encoded, again):
    """encoded: shards encoded before the kill; again: those that the second run encodes."""
    whole, cache, log = tmp_path / "whole", tmp_path / "cache", tmp_path / "log"
    run(whole)
    killed = start(cache, log, mode)
    _, errors = killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL, errors
    assert len(calls_of(log)) == encoded
    encoder = Encoder()
    run(cache, encoder)
    assert len(encoder.encoded) == again
    assert bytes_of(the_folder(cache)) == bytes_of(the_folder(whole))
    assert not list(the_folder(cache).glob("*.part"))


def test_two_processes_at_once_encode_once(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    both = [start(cache, log, "slow"), start(cache, log, "slow")]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum(int(out.rpartition("=")[2]) for out, _ in outputs) == SHARDS
    assert len(calls_of(log)) == SHARDS
    np.testing.assert_array_equal(all_of(run(cache)), vectors_of(TEXTS))


def test_progress_goes_to_stderr_with_a_rate(tmp_path, capsys):
    cached_vectors(Encoder(), store_of(TEXTS), tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{COUNT}/{COUNT}" in captured.err and "passages/s" in captured.err
    run(tmp_path, Encoder({"sha256": "silent"}))
    assert capsys.readouterr().err == ""


def encoder_that_returns(vectors):
    encoder = Encoder()
    encoder.encode_tokens = lambda tokens, advance=None: vectors(len(tokens))
    return encoder


def test_wrong_encoders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shape"):
        run(tmp_path, encoder_that_returns(lambda n: np.zeros((n, WIDTH + 1), np.float32)))
    with pytest.raises(ValueError, match="shape"):
        run(tmp_path, encoder_that_returns(lambda n: np.zeros((1, WIDTH), np.float32)))
    with pytest.raises(UserError, match="not finite"):
        run(tmp_path, encoder_that_returns(lambda n: np.full((n, WIDTH), np.nan, np.float32)))
    with pytest.raises(ValueError, match="no passages"):
        run(tmp_path, texts=[])
    np.testing.assert_array_equal(all_of(run(tmp_path)), vectors_of(TEXTS))


def test_too_little_room_is_told_before_anything_is_encoded(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    encoder = Encoder()
    with pytest.raises(UserError, match=r"needs 1,200 bytes, and 1,000 are free.*RAGJAX_CACHE"):
        run(tmp_path, encoder)
    assert encoder.encoded == []


def test_a_disk_that_fills_up_is_one_sentence_and_keeps_what_is_whole(tmp_path, monkeypatch):
    write, written = np.lib.format.write_array, []

    def full(file, array, **options):
        if len(written) == 3:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        written.append(array)
        write(file, array, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.lib.format, "write_array", full)
        with pytest.raises(UserError, match=r"No space left on device.*RAGJAX_CACHE"):
            run(tmp_path)
    assert not list(the_folder(tmp_path).glob("*.part"))
    encoder = Encoder()
    np.testing.assert_array_equal(all_of(run(tmp_path, encoder)), vectors_of(TEXTS))
    assert len(encoder.encoded) == SHARDS - 3


def test_a_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be stored at .*RAGJAX_CACHE"):
        run(tmp_path / "file" / "cache")


if __name__ == "__main__":
    worker(*sys.argv[1:])
