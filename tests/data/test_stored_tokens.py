"""Token ids on disk: what comes back, when a text is tokenised again, and what happens where the file is of no use."""

import functools
import gc
import sqlite3
from types import SimpleNamespace

import pytest

from ragjax.config import RunConfig
from ragjax.data.prompts import PromptBuilder
from ragjax.data.questions import Passage
from ragjax.data.stored_tokens import StoredTokens
from ragjax.pipeline import prompt_builder

TEXTS = ["the town", "", "日本語 é \ud800", "the town "]


class Letters:
    """A tokenizer of letters, with the ids `start + code`; the texts that it was given are counted."""

    def __init__(self, start=0):
        self.start, self.texts = start, []

    def __call__(self, text):
        self.texts.append(text)
        return [self.start + ord(letter) for letter in text]


@pytest.mark.parametrize("start", [0, 100_000])
def test_a_text_is_tokenised_once_for_all_runs(tmp_path, start):
    letters, expected = Letters(start), [Letters(start)(text) for text in TEXTS]
    first, beside = (StoredTokens(letters, tmp_path / "tokens", "a") for _ in range(2))
    assert [first(text) for text in TEXTS] == expected
    letters.texts.clear()
    assert [beside(text) for text in TEXTS] == [first(text) for text in TEXTS] == expected
    assert letters.texts == []
    assert [StoredTokens(letters, tmp_path / "tokens", "a")(text) for text in TEXTS] == expected
    assert not set(letters.texts) & set(TEXTS)


def test_what_tokenises_differently_has_a_file_of_its_own(tmp_path):
    """Other files of the tokenizer, and another version of a library that makes something else of them."""
    for letters, made_by in ((Letters(), "a"), (Letters(), "b"), (Letters(1), "b")):
        stored = StoredTokens(letters, tmp_path, made_by)
        letters.texts.clear()
        assert stored("xyz") == Letters(letters.start)("xyz")
        assert letters.texts == ["xyz"]
    del stored
    gc.collect()
    assert len(list(tmp_path.glob("*.sqlite"))) == 3


@pytest.mark.parametrize(
    "damage", ["substr(ids, 1, 7)", "x'00'", "'text'", "CAST(ids || x'0000' AS BLOB)", "x'00000000'"]
)
def test_damaged_ids_are_made_again(tmp_path, damage):
    letters = Letters()
    stored = StoredTokens(letters, tmp_path, "a")
    expected = stored("the town")
    (path,) = tmp_path.glob("*.sqlite")
    other = sqlite3.connect(path)
    with other:
        assert other.execute(f"UPDATE tokens SET ids = {damage}").rowcount == 1
    other.close()
    letters.texts.clear()
    assert stored("the town") == stored("the town") == expected
    assert letters.texts == ["the town"]


def no_database(folder):
    StoredTokens(Letters(), folder, "a")
    gc.collect()
    (path,) = folder.glob("*.sqlite")
    path.write_bytes(b"something else " * 1000)


def no_folder(folder):
    folder.write_text("a file")


@pytest.mark.parametrize("spoil", [no_database, no_folder])
def test_without_the_file_texts_are_tokenised_each_time(tmp_path, capsys, spoil):
    spoil(tmp_path / "tokens")
    stored = StoredTokens(Letters(), tmp_path / "tokens", "a")
    assert [stored(text) for text in TEXTS] == [Letters()(text) for text in TEXTS]
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and str(tmp_path / "tokens") in said and "RAGJAX_CACHE" in said


def test_a_file_that_cannot_be_written_is_still_read(tmp_path, capsys):
    letters = Letters()
    stored = StoredTokens(letters, tmp_path, "a")
    kept = stored("kept")
    stored._file.execute("PRAGMA query_only = TRUE")
    letters.texts.clear()
    assert stored("new") == stored("new") == Letters()("new") and stored("kept") == kept
    assert letters.texts == ["new", "new"]
    assert capsys.readouterr().err.count("warning: ") == 1


def test_a_file_that_fails_later_is_left_alone(tmp_path, capsys):
    stored = StoredTokens(Letters(), tmp_path, "a")
    (path,) = tmp_path.glob("*.sqlite")
    other = sqlite3.connect(path)
    with other:
        other.execute("DROP TABLE tokens")
    other.close()
    assert stored("ab") == stored("ab") == [97, 98]
    assert capsys.readouterr().err.count("warning: ") == 1


class Joining:
    """Letters, where a full stop and the blank line after it are one token."""

    def __init__(self, joins):
        self.joins = joins

    def __call__(self, text, **options):
        return {"input_ids": list(map(ord, text.replace(".\n\n", "\N{BULLET}") if self.joins else text))}


@pytest.mark.parametrize("joins", [True, False])
def test_prompts_are_those_of_a_builder_that_stores_nothing(tmp_path, joins):
    passages = [Passage("a", "", "The town."), Passage("b", "R", "A river"), Passage("c", "", "A lake. " * 20)]
    stored = functools.partial(StoredTokens, folder=tmp_path, made_by="letters")
    plain = PromptBuilder(Joining(joins), 2, max_passage_tokens=40, window=1000)
    expected = plain.prompt(passages, "Where?", reserve=1)
    for _ in range(2):
        builder = PromptBuilder(Joining(joins), 2, max_passage_tokens=40, window=1000, stored=stored)
        assert builder.prompt(passages, "Where?", reserve=1) == expected
        assert builder.passage(passages[0]) == plain.passage(passages[0])
    assert (ord("\N{BULLET}") in expected.ids) == joins


def test_a_pipeline_keeps_them_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAGJAX_CACHE", str(tmp_path))
    tokenizer = Joining(False)
    window = SimpleNamespace(max_position_embeddings=1000, vocab_size=1000)
    generator = SimpleNamespace(tokenizer=tokenizer, eos_token_id=2, config=window, source=SimpleNamespace(sha256="a"))
    first = prompt_builder(RunConfig(), generator).passage(Passage("a", "", "the town"))
    second = prompt_builder(RunConfig(), generator)
    monkeypatch.setattr(second._pieces, "_tokenizer", None)
    assert second.passage(Passage("b", "", "the town")) == first == list(map(ord, "the town"))
