"""The vectors on disk: right rows, one encoding, resumed after SIGKILL, never damaged without notice.

Run as a program (see `worker`), this file encodes in a process of its own, which some tests kill.
"""

import json
import os
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
from ragjax.retrieval import encode as module
from ragjax.retrieval.encode import encode_corpus

COUNT, WIDTH, CHUNK = 50, 6, 8
CHUNKS = 7
# Lengths go up and down, so that the order of encoding is far from the order of the rows.
TEXTS = [f"{row} " + "word " * (row * 7 % 13) for row in range(COUNT)]


def vectors_of(texts):
    """The vector of a text, [n, WIDTH], from its number alone."""
    rows = np.array([int(text.split()[0]) for text in texts])
    return np.sin(np.arange(1, WIDTH + 1) * (rows[:, None] + 1)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", CHUNK)


class Encoder:
    """Counts what it is asked for."""

    def __init__(self):
        self.calls = []

    def __call__(self, texts):
        self.calls.append(list(texts))
        return vectors_of(texts)


def store_of(texts):
    return PassageList([Passage(f"p{row}", "", text) for row, text in enumerate(texts)])


def run(cache_dir, encode=None, texts=TEXTS, key="mini", width=WIDTH, **options):
    options = {"count_tokens": len, "show_progress": False} | options
    return encode_corpus(encode or Encoder(), store_of(texts), key, cache_dir, width, **options)


def the_folder(cache_dir):
    (folder,) = [path for path in cache_dir.iterdir() if path.is_dir()]
    return folder


def test_vectors_stand_in_the_order_of_the_texts(tmp_path):
    found = run(tmp_path)
    assert isinstance(found.vectors, np.memmap)
    assert found.vectors.dtype == np.float32
    np.testing.assert_array_equal(found.vectors, vectors_of(TEXTS))
    assert not found.cached
    with pytest.raises(ValueError, match="read-only"):
        found.vectors[0] = 0


def test_texts_are_encoded_longest_first_in_chunks(tmp_path):
    encoder = Encoder()
    run(tmp_path, encoder)
    assert [len(call) for call in encoder.calls] == [CHUNK] * (COUNT // CHUNK) + [COUNT % CHUNK]
    flat = [text for call in encoder.calls for text in call]
    assert sorted(flat) == sorted(TEXTS)
    lengths = [len(text) for text in flat]
    assert lengths == sorted(lengths, reverse=True)


def test_the_second_time_nothing_is_encoded(tmp_path):
    first = run(tmp_path)
    encoder = Encoder()
    second = run(tmp_path, encoder)
    assert encoder.calls == []
    assert second.cached
    assert second.seconds == first.seconds > 0
    np.testing.assert_array_equal(second.vectors, vectors_of(TEXTS))


def test_every_part_of_the_key_counts(tmp_path):
    run(tmp_path)
    others = [
        {"key": "other embedder"},
        {"texts": TEXTS[:-1]},
        {"texts": TEXTS[::-1]},
        {"texts": ["49 moved", *TEXTS[1:]]},
        {"texts": ["1", "23"]},
        {"texts": ["12", "3"]},
    ]
    for other in others:
        encoder = Encoder()
        found = run(tmp_path, encoder, **other)
        assert encoder.calls and not found.cached
        np.testing.assert_array_equal(found.vectors, vectors_of(other.get("texts", TEXTS)))
    assert run(tmp_path).cached


def test_meta_says_what_was_made(tmp_path):
    found = run(tmp_path, count_tokens=lambda texts: 3 * len(texts))
    folder = the_folder(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "vectors.npy"]
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["embedder"] == "mini"
    assert (meta["count"], meta["width"], meta["tokens"]) == (COUNT, WIDTH, 3 * COUNT)
    assert meta["seconds"] == found.seconds
    assert len(meta["sha256"]) == 64
    assert (found.tokens, run(tmp_path).tokens) == (3 * COUNT, 3 * COUNT)
    np.testing.assert_array_equal(np.load(folder / "vectors.npy", allow_pickle=False), vectors_of(TEXTS))


@pytest.mark.parametrize("damage", ["flipped bit", "cut off", "no vectors", "no meta", "bad meta", "other shape"])
def test_a_damaged_cache_is_encoded_again_with_a_warning(tmp_path, damage):
    run(tmp_path)
    folder = the_folder(tmp_path)
    vectors, meta = folder / "vectors.npy", folder / "meta.json"
    data = bytearray(vectors.read_bytes())
    if damage == "flipped bit":
        data[-3] ^= 4
        vectors.write_bytes(data)
    elif damage == "cut off":
        vectors.write_bytes(data[:-100])
    elif damage == "no vectors":
        vectors.unlink()
    elif damage == "no meta":
        meta.unlink()
    elif damage == "bad meta":
        meta.write_text('{"seconds": 1}')
    else:
        np.save(vectors, np.zeros((COUNT, WIDTH + 1), np.float32))
        said = json.loads(meta.read_text())
        meta.write_text(json.dumps({**said, "sha256": module.sha256_file(vectors)}))
    encoder = Encoder()
    with pytest.warns(UserWarning, match="damaged: encoding again"):
        found = run(tmp_path, encoder)
    assert len(encoder.calls) == CHUNKS and not found.cached
    np.testing.assert_array_equal(found.vectors, vectors_of(TEXTS))
    assert run(tmp_path).cached


def stop_at_chunk(number):
    """An encoder that is interrupted in its call of that number, counted from 1."""
    encoder = Encoder()

    def encode(texts):
        if len(encoder.calls) + 1 == number:
            raise KeyboardInterrupt
        return encoder(texts)

    return encode


@pytest.mark.parametrize("damage", [None, "progress", "cut off", "no vectors"])
def test_an_interrupted_run_is_taken_up(tmp_path, damage):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at_chunk(4))
    partial = the_folder(tmp_path)
    assert partial.name.endswith(".partial")
    if damage == "progress":
        (partial / "progress.json").write_text("{")
    elif damage == "cut off":
        (partial / "vectors.npy").write_bytes((partial / "vectors.npy").read_bytes()[:-4])
    elif damage == "no vectors":
        (partial / "vectors.npy").unlink()
    encoder = Encoder()
    found = run(tmp_path, encoder)
    assert len(encoder.calls) == (CHUNKS - 3 if damage is None else CHUNKS)
    np.testing.assert_array_equal(found.vectors, vectors_of(TEXTS))


def test_another_chunk_size_starts_afresh(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at_chunk(4))
    monkeypatch.setattr(module, "CHUNK", 20)
    encoder = Encoder()
    found = run(tmp_path, encoder)
    assert [len(call) for call in encoder.calls] == [20, 20, 10]
    np.testing.assert_array_equal(found.vectors, vectors_of(TEXTS))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def worker(cache_dir, log, mode):
    """Encodes TEXTS; each call of the encoder appends its texts' numbers to `log` as one line.

    mode says where the process kills itself: encode:N inside the N-th call of the encoder, record:N when the
    N-th chunk's vectors are on disk and not yet recorded, finish just before the finished folder appears.
    "slow" runs through, taking its time.
    """
    place, _, number = mode.partition(":")
    encoder, write_json = Encoder(), module.write_json

    def encode(texts):
        if place == "encode" and len(encoder.calls) + 1 == int(number):
            die()
        if place == "slow":
            time.sleep(0.05)
        with open(log, "a") as file:
            file.write(" ".join(text.split()[0] for text in texts) + "\n")
        return encoder(texts)

    def write_or_die(path, value, **options):
        if place == "record" and path.name == "progress.json" and value["chunks"] == int(number):
            die()
        write_json(path, value, **options)
        if place == "finish" and path.name == "meta.json":
            die()

    module.write_json, module.CHUNK = write_or_die, CHUNK
    print(f"cached={run(Path(cache_dir), encode, key='worker').cached}")


def start(cache_dir, log, mode):
    """Starts `worker` on the ragjax that this test imports, from the tree or from a wheel."""
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    command = [sys.executable, __file__, str(cache_dir), str(log), mode]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def calls_of(log):
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize(
    ("mode", "recorded", "again"),
    [("encode:4", 3, CHUNKS - 3), ("record:4", 4, CHUNKS - 3), ("finish", CHUNKS, 0)],
)
def test_a_killed_run_is_resumed_with_the_same_bytes(tmp_path, mode, recorded, again):
    """recorded: chunks encoded before the kill; again: chunks that the second run encodes."""
    whole, cache, log = tmp_path / "whole", tmp_path / "cache", tmp_path / "log"
    run(whole, key="worker")
    killed = start(cache, log, mode)
    _, errors = killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL, errors
    assert len(calls_of(log)) == recorded
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".partial"]
    log.unlink(missing_ok=True)
    encoder = Encoder()
    found = run(cache, encoder, key="worker")
    assert len(encoder.calls) == again
    assert not found.cached
    assert (the_folder(cache) / "vectors.npy").read_bytes() == (the_folder(whole) / "vectors.npy").read_bytes()
    assert run(cache, key="worker").cached


def test_two_processes_at_once_encode_once(tmp_path):
    cache, log = tmp_path / "cache", tmp_path / "log"
    both = [start(cache, log, "slow"), start(cache, log, "slow")]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted(out for out, _ in outputs) == ["cached=False\n", "cached=True\n"]
    assert len(calls_of(log)) == CHUNKS
    np.testing.assert_array_equal(run(cache, key="worker").vectors, vectors_of(TEXTS))


def test_progress_goes_to_stderr_with_a_rate(tmp_path, capsys):
    run(tmp_path, show_progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{COUNT}/{COUNT}" in captured.err and "passages/s" in captured.err
    run(tmp_path, key="silent")
    assert capsys.readouterr().err == ""


def test_wrong_encoders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shape"):
        run(tmp_path, lambda texts: np.zeros((len(texts), WIDTH + 1), np.float32))
    with pytest.raises(ValueError, match="shape"):
        run(tmp_path, lambda texts: np.zeros((1, WIDTH), np.float32))
    with pytest.raises(UserError, match="not finite"):
        run(tmp_path, lambda texts: np.full((len(texts), WIDTH), np.nan, np.float32))
    with pytest.raises(ValueError, match="no passages"):
        run(tmp_path, texts=[])
    np.testing.assert_array_equal(run(tmp_path).vectors, vectors_of(TEXTS))


def test_an_error_of_the_encoder_stays_what_it_is(tmp_path):
    def encode(texts):
        raise OSError("no such device")

    with pytest.raises(OSError, match="no such device"):
        run(tmp_path, encode)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match="No space left on device.*RAGJAX_CACHE"):
        run(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be stored at .*RAGJAX_CACHE"):
        run(tmp_path / "file" / "cache")


if __name__ == "__main__":
    worker(*sys.argv[1:])
