"""The reader of passages and questions: what it accepts, and one sentence for each thing it does not."""

import gzip
import json
import re

import pytest

from ragjax.data.questions import Passage, Question, check_answers, read_corpus, read_questions
from ragjax.errors import UserError

PASSAGE = {"id": "p1", "title": "Paris", "text": "The capital of France."}
QUESTION = {"id": "q1", "question": "Capital of France?", "answers": ["Paris"], "positive_ids": ["p1"]}


def write(folder, *lines, name="file.jsonl"):
    """A file of the lines: bytes as they are, str in UTF-8, anything else as JSON."""
    parts = []
    for line in lines:
        if not isinstance(line, bytes):
            line = (line if isinstance(line, str) else json.dumps(line)).encode()
        parts.append(line + b"\n")
    path = folder / name
    data = b"".join(parts)
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def fault_of(read, *arguments):
    """The message of the UserError, checked to be one sentence."""
    with pytest.raises(UserError) as caught:
        read(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert not re.search(r"\. [A-Z]", message), "one sentence"
    return message


def test_what_a_passage_reads_as():
    assert Passage("p", "Paris", "The capital.").embedder_text == "Paris. The capital."
    assert Passage("p", "Paris", "The capital.").prompt_text == "Paris: The capital."
    assert Passage("p", "", "The capital.").embedder_text == "The capital."
    assert Passage("p", "", "The capital.").prompt_text == "The capital."


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_read_corpus(tmp_path, name):
    path = write(
        tmp_path,
        PASSAGE,
        {"id": "p2", "text": " kept\u2028as it is "},
        {"id": "p3", "title": None, "text": "c", "extra": {"ignored": 1}},
        "",
        '{"id": "p4", "title": " ", "text": "Zürich \u2028 \U0001f600"}\r',
        name=name,
    )
    assert read_corpus(path) == [
        Passage("p1", "Paris", "The capital of France."),
        Passage("p2", "", " kept\u2028as it is "),
        Passage("p3", "", "c"),
        Passage("p4", "", "Zürich \u2028 \U0001f600"),
    ]


def test_read_questions(tmp_path):
    path = write(
        tmp_path,
        QUESTION,
        {"id": "q2", "question": "?", "answers": ["The", "b", "b"], "positive_ids": []},
        {"id": "q3", "question": "x", "answers": ["c"]},
        {"id": "q4", "question": "y", "answers": ["d"], "positive_ids": ["p1", "p2", "p1"]},
        {"id": "q5", "question": "z", "positive_ids": ["p1"]},
        {"id": "q6", "question": "z", "answers": None},
        {"id": "q7", "question": "z", "answers": []},
    )
    expected = [
        Question("q1", "Capital of France?", ("Paris",), ("p1",)),
        Question("q2", "?", ("The", "b", "b"), ()),
        Question("q3", "x", ("c",), ()),
        Question("q4", "y", ("d",), ("p1", "p2")),
        Question("q5", "z", (), ("p1",)),
        Question("q6", "z", (), ()),
        Question("q7", "z", (), ()),
    ]
    assert read_questions(path, {"p1", "p2"}) == expected
    assert read_questions(path, None) == expected
    assert read_questions(write(tmp_path, name="empty.jsonl"), {"p1"}) == []


def test_a_question_without_answers_is_named_where_they_are_needed(tmp_path):
    path = write(tmp_path, QUESTION, {"id": "q2", "question": "?"}, {"id": "q3", "question": "?"}, name="dev.jsonl")
    asked = read_questions(path)
    check_answers(asked[:1], path, "--decode=concat")
    message = fault_of(check_answers, asked, path, "--decode=concat")
    assert f'{path}: the question with the id "q2" has no answers, which --decode=concat needs: ' in message
    assert "--decode=none and --strategy=embedder, which need none" in message


def test_byte_order_mark_and_missing_last_newline_are_read(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PASSAGE).encode())
    assert read_corpus(path) == [Passage("p1", "Paris", "The capital of France.")]


BAD_PASSAGES = [
    ('{"id": "p2", ', "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('["p2", "text"]', "a list"),
    ("3", "a number"),
    ("null", "null"),
    ({"title": "t", "text": "x"}, '"id" is missing'),
    ({"id": "", "text": "x"}, '"id" is empty'),
    ({"id": 7, "text": "x"}, '"id" is a number'),
    ({"id": True, "text": "x"}, '"id" is true or false'),
    ({"id": "p2"}, '"text" is missing'),
    ({"id": "p2", "text": " \n"}, '"text" is empty'),
    ({"id": "p2", "text": ["x"]}, '"text" is a list'),
    ({"id": "p2", "text": None}, '"text" is null'),
    ({"id": "p2", "text": "x", "title": 3}, '"title" is a number'),
    ('{"id": "p2", "text": "half \\ud83d of one"}', '"text" holds half of a surrogate pair'),
    ('{"id": "\\udc00", "text": "x"}', '"id" holds half of a surrogate pair'),
    (b'{"id": "p2", "text": "caf\xe9"}', "byte 26 is not valid UTF-8"),
    ({"id": "p1", "text": "another"}, 'the id "p1" already stands on line 1'),
]


@pytest.mark.parametrize("packed", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize(("line", "fault"), BAD_PASSAGES, ids=[fault for _, fault in BAD_PASSAGES])
def test_a_bad_passage_is_named_with_file_and_line(tmp_path, line, fault, packed):
    path = write(tmp_path, PASSAGE, "", line, {"id": "p9", "text": "never reached"}, name=f"corpus{packed}")
    message = fault_of(read_corpus, path)
    assert message.startswith(f"{path}, line 3: ")
    assert fault in message


def without(key):
    return {name: value for name, value in QUESTION.items() if name != key}


BAD_QUESTIONS = [
    (without("id"), '"id" is missing'),
    ({**QUESTION, "id": ["q"]}, '"id" is a list'),
    (without("question"), '"question" is missing'),
    ({**QUESTION, "question": ""}, '"question" is empty'),
    ({**QUESTION, "question": {"text": "x"}}, '"question" is an object'),
    ({**QUESTION, "answers": "Paris"}, '"answers" is a string'),
    ({**QUESTION, "answers": ["Paris", ""]}, 'entry 2 of "answers" is empty'),
    ({**QUESTION, "answers": [1889]}, 'entry 1 of "answers" is a number'),
    ({**QUESTION, "positive_ids": "p1"}, '"positive_ids" is a string'),
    ({**QUESTION, "positive_ids": ["p1", 2]}, 'entry 2 of "positive_ids" is a number'),
    ({**QUESTION, "positive_ids": ["p1", "p7"]}, 'the positive id "p7" is not in the corpus'),
]


@pytest.mark.parametrize(("line", "fault"), BAD_QUESTIONS, ids=[fault for _, fault in BAD_QUESTIONS])
def test_a_bad_question_is_named_with_file_and_line(tmp_path, line, fault):
    path = write(tmp_path, {**QUESTION, "id": "q0"}, line, name="dev.jsonl")
    message = fault_of(read_questions, path, {"p1"})
    assert message.startswith(f"{path}, line 2: ")
    assert fault in message


def test_a_question_id_that_occurs_twice(tmp_path):
    path = write(tmp_path, QUESTION, {**QUESTION, "id": "q2"}, QUESTION)
    assert f'{path}, line 3: the id "q1" already stands on line 1' in fault_of(read_questions, path, {"p1"})


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_an_empty_corpus(tmp_path, lines):
    path = write(tmp_path, *lines)
    assert f"{path} holds no passages" in fault_of(read_corpus, path)


def test_a_truncated_gzip_file(tmp_path):
    path = write(tmp_path, *({"id": f"p{i}", "text": f"text {i * i}"} for i in range(2000)), name="c.jsonl.gz")
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 1, 5):
        path.write_bytes(whole[:length])
        message = fault_of(read_corpus, path)
        assert re.match(rf"{re.escape(str(path))} is cut off after line \d+: ", message)


def test_a_damaged_gzip_file(tmp_path):
    path = write(tmp_path, *({"id": f"p{i}", "text": f"text {i * i}"} for i in range(2000)), name="c.jsonl.gz")
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # in the checksum
    path.write_bytes(data)
    assert f"{path} is not an intact gzip file" in fault_of(read_corpus, path)


def test_plain_text_named_gz(tmp_path):
    path = tmp_path / "corpus.jsonl.gz"
    path.write_text(json.dumps(PASSAGE))
    message = fault_of(read_corpus, path)
    assert f"{path} is not an intact gzip file" in message
    assert "drop .gz" in message


def test_a_missing_file_and_a_folder(tmp_path):
    assert f"{tmp_path / 'none.jsonl'} cannot be read" in fault_of(read_corpus, tmp_path / "none.jsonl")
    assert f"{tmp_path} cannot be read" in fault_of(read_questions, tmp_path, None)
