"""Each maker's files in their own columns: what becomes of them, record by record."""

import json
from collections import Counter

import pytest

from ragjax.data.questions import Passage
from ragjax.data.sources import Asked, Label, open_corpus, open_source
from ragjax.data.sources.source import content_id
from ragjax.errors import UserError
from tests.data.written import write


def read(source, dropped=None):
    """(passages, questions by split) of a source."""
    dropped = Counter() if dropped is None else dropped
    passages = list(source.passages(dropped)) if source.passages else None
    return passages, {name: list(split.questions(dropped)) for name, split in source.splits.items()}


def fault_of(folder) -> str:
    with pytest.raises(UserError) as caught:
        read(open_source(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


CORPUS = [{"id": "p1", "title": "Paris", "text": "A city."}, {"id": "p2", "title": "Only a title", "text": ""}]
TRAIN = [{"id": "q1", "question": "City?", "answers": ["Paris", "paris"], "positive_ids": ["p1"]}]


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".tsv.gz", ".json"])
def test_ragjaxs_own_columns_in_other_files(tmp_path, ending):
    write(tmp_path / f"corpus{ending}", CORPUS)
    write(tmp_path / f"train{ending}", TRAIN)
    place = f"{tmp_path / f'train{ending}'}, {'entry' if ending == '.json' else 'row'} 1"
    passages, questions = read(open_source(tmp_path))
    assert passages == [Passage("p1", "Paris", "A city."), Passage("p2", "", "Only a title")]
    assert questions == {"train": [Asked("q1", "City?", ("Paris", "paris"), (Label("p1", "", place),))]}


def test_numbers_serve_as_ids(tmp_path):
    write(tmp_path / "corpus.parquet", [{"id": 7, "text": "x"}])
    write(tmp_path / "dev.parquet", [{"id": 1, "question": "?", "answers": ["x"]}])
    passages, questions = read(open_source(tmp_path))
    assert passages == [Passage("7", "", "x")]
    assert questions["dev"] == [Asked("1", "?", ("x",))]


def test_a_wrong_column_is_named_with_those_that_exist(tmp_path):
    write(tmp_path / "corpus.csv", [{"id": "p1", "body": "x"}])
    write(tmp_path / "test.csv", [{"id": "q1", "query": "?", "answers": ["x"]}])
    message = fault_of(tmp_path)
    assert "test.csv has no questions" in message and "its columns are id, query, answers" in message
    write(tmp_path / "test.csv", TRAIN)
    message = fault_of(tmp_path)
    assert "corpus.csv has no passages" in message and "its columns are id, body" in message
    (tmp_path / "corpus.csv").write_text("id;title;text\np1;Paris;It is a city.\n")
    assert "corpus.csv separates its columns by ';': separate them by commas" in fault_of(tmp_path)
    (tmp_path / "corpus.csv").write_text("")
    assert "corpus.csv has no passages, because it is empty: write them, or remove the file" in fault_of(tmp_path)


def test_flashrag(tmp_path):
    metadata = {"type": "bridge", "supporting_facts": {"title": ["A", "B", "A"], "sent_id": [0, 1, 2]}}
    write(
        tmp_path / "corpus.jsonl",
        [{"id": "0", "contents": '"Aaron"\nAaron was a\nprophet.'}, {"id": "1", "contents": "no title"}],
    )
    write(
        tmp_path / "train.jsonl",
        [{"id": "train_0", "question": "q?", "golden_answers": ["x", "x", "y"], "metadata": metadata}],
    )
    popqa = {"id": "test_0", "question": "p?", "golden_answers": ["z"], "metadata": {"s_wiki_title": "Page"}}
    write(tmp_path / "test.jsonl", [popqa, popqa])
    dropped = Counter()
    passages, questions = read(open_source(tmp_path), dropped)
    assert passages == [Passage("0", "Aaron", "Aaron was a\nprophet."), Passage("1", "", "no title")]
    labels = (Label(title="A"), Label(title="B"))
    assert questions["train"] == [Asked("train_0", "q?", ("x", "y"), labels)]
    assert questions["test"] == [Asked("test_0", "p?", ("z",), (Label(title="Page"),))]
    assert dropped == {"questions whose id had been there already": 1}


def context(title, text, **ids):
    return {"title": title, "text": text, "score": 1000, "title_score": 1, **ids}


def test_dpr(tmp_path):
    # As its makers write it: quotes doubled inside quotes, columns in this order.
    (tmp_path / "psgs_w100.tsv").write_text('id\ttext\ttitle\n1\t"Aaron (""Ahärôn"") is"\tAaron\n2\tNext.\t"A ""B"""\n')
    positives = [context("Aaron", "Aaron is", passage_id="1"), context("A", "x", psg_id=2)]
    record = {"dataset": "nq", "question": "who\u2019s he", "answers": ["him"], "positive_ctxs": positives}
    record |= {"negative_ctxs": [], "hard_negative_ctxs": [context("N", "neg", passage_id="wiki:9")]}
    write(tmp_path / "biencoder-nq-train.json", [record])
    write(tmp_path / "biencoder-nq-dev.json", [{**record, "question": "other"}])
    (tmp_path / "nq-dev.qa.csv").write_text("not read\t['x']\n")
    (tmp_path / "nq-test.qa.csv").write_text('who got it\t[\'Röntgen\', "O\'Neil"]\nwho else\t"[""a \'b\'""]"\n')
    passages, questions = read(open_source(tmp_path))
    assert passages == [Passage("1", "Aaron", 'Aaron ("Ahärôn") is'), Passage("2", 'A "B"', "Next.")]
    (asked,) = questions["train"]
    assert (asked.question, asked.answers) == ("who's he", ("him",))
    assert asked.labels == (Label("1", "Aaron"), Label("2", "A"))
    assert [each.question for each in questions["dev"]] == ["other"]
    assert [each.answers for each in questions["test"]] == [("Röntgen", "O'Neil"), ("a 'b'",)]
    (tmp_path / "psgs_w100.tsv").unlink()
    passages, _ = read(open_source(tmp_path))
    assert [passage.id for passage in passages] == ["1", "2", "9"]
    (tmp_path / "nq-test.qa.csv").write_text("who got it\t__import__('os').system('true')\n")
    assert "line 1: not a question, a tab and a list of answers" in fault_of(tmp_path)


HOTPOT = {
    "id": "5a7",
    "question": "Which magazine?",
    "answer": "Arthur's Magazine",
    "type": "comparison",
    "level": "medium",
    "supporting_facts": {"title": ["Arthur's Magazine", "Elsewhere", "Arthur's Magazine"], "sent_id": [0, 0, 1]},
    "context": {
        "title": ["Radio City", "Arthur's Magazine"],
        "sentences": [["Radio City is", ".", " It  plays."], ["Arthur's Magazine was.", " It closed."]],
    },
}


def paragraph(title, text):
    return Passage(content_id("hotpotqa", title, text), title, text)


RADIO = paragraph("Radio City", "Radio City is. It plays.")
ARTHUR = paragraph("Arthur's Magazine", "Arthur's Magazine was. It closed.")
HOTPOT_LABELS = (Label(ARTHUR.id, "Arthur's Magazine"), Label("", "Elsewhere"))


def test_hotpotqa_as_the_hub_has_it(tmp_path):
    write(tmp_path / "train-00000-of-00001.parquet", [HOTPOT])
    write(tmp_path / "validation-00000-of-00001.parquet", [{**HOTPOT, "id": "5b8"}])
    dropped = Counter()
    source = open_source(tmp_path)
    passages, questions = read(source, dropped)
    assert passages == [RADIO, ARTHUR]
    assert dropped == {"passages that had been there already": 2}
    asked = Asked("5a7", "Which magazine?", ("Arthur's Magazine",), HOTPOT_LABELS)
    assert questions["train"] + questions["dev"] == [asked]  # on the side that its words say
    assert [each.id for each in questions["test"]] == ["5b8"]
    assert source.notes[-1] == "test is what was published as validation, dev 5 % of train"


def test_hotpotqa_as_its_makers_have_it(tmp_path):
    pairs = {
        "supporting_facts": [["Arthur's Magazine", 0], ["Elsewhere", 0]],
        "context": list(zip(HOTPOT["context"]["title"], HOTPOT["context"]["sentences"], strict=True)),
    }
    own = {key: value for key, value in HOTPOT.items() if key != "id"} | pairs | {"_id": "5a7"}
    write(tmp_path / "hotpot_dev_distractor_v1.json", [own])
    passages, questions = read(open_source(tmp_path))
    assert passages == [RADIO, ARTHUR]
    assert questions == {"test": [Asked("5a7", "Which magazine?", ("Arthur's Magazine",), HOTPOT_LABELS)]}
    write(tmp_path / "hotpot_dev_distractor_v1.json", [own | {"context": "none"}])
    assert 'entry 1: "context" is not as in HotPotQA' in fault_of(tmp_path)


def popqa(number, **changes):
    return {
        "id": 4222362 + number,
        "subj": "George Rankin",
        "prop": "occupation",
        "obj": "politician",
        "s_aliases": '["George James Rankin"]',
        "s_wiki_title": "George Rankin",
        "s_pop": 142,
        "question": f"What is the occupation of number {number}?",
        "possible_answers": json.dumps(["politician", "political leader"]),
    } | changes


@pytest.mark.parametrize("name", ["test.tsv", "test-00000-of-00001.parquet"])
def test_popqa_is_divided_by_its_words(tmp_path, name):
    rows = [popqa(number) for number in range(400)]
    write(tmp_path / name, rows)
    source = open_source(tmp_path)
    passages, questions = read(source)
    assert passages is None and source.layout == "PopQA"
    asked = {each.id: each for split in questions.values() for each in split}
    assert len(asked) == sum(map(len, questions.values())) == 400
    answers, labels = ("politician", "political leader"), (Label("", "George Rankin"),)
    assert asked["popqa-4222362"] == Asked("popqa-4222362", rows[0]["question"], answers, labels)
    shares = {split: len(found) / 400 for split, found in questions.items()}
    assert shares["train"] == pytest.approx(0.8, abs=0.06) and shares["test"] == pytest.approx(0.15, abs=0.06)
    assert 0.02 < shares["dev"] < 0.09
    # The sides do not depend on what else there is, on the order, or on the id.
    write(tmp_path / name, [popqa(number, id=9000 + number) for number in range(399, 199, -1)])
    again = read(open_source(tmp_path))[1]
    for split, found in questions.items():
        kept = {each.question for each in found} & {row["question"] for row in rows[200:]}
        assert {each.question for each in again[split]} == kept


def test_popqa_without_answers_or_with_broken_ones(tmp_path):
    dropped = Counter()
    write(tmp_path / "test.parquet", [popqa(0, possible_answers="[]"), popqa(1, s_wiki_title="")])
    _, questions = read(open_source(tmp_path), dropped)
    assert [each.labels for split in questions.values() for each in split] == [()]
    assert dropped == {"questions without an answer": 1}
    write(tmp_path / "test.parquet", [popqa(0, possible_answers="[politician]")])
    assert 'row 1: "possible_answers" is no JSON' in fault_of(tmp_path)


def squad(number, title="University_of_Notre_Dame", **changes):
    return {
        "id": str(number),
        "title": title,
        "context": f"The context of {title}.",
        "question": f" Question {number}?",
        "answers": {"text": ["a", "a", "b"], "answer_start": [0, 0, 4]},
    } | changes


def test_squad(tmp_path):
    nothing = {"text": [], "answer_start": []}
    write(
        tmp_path / "train.parquet", [squad(n, f"Article {n // 5}") for n in range(500)] + [squad(500, answers=nothing)]
    )
    write(tmp_path / "validation.parquet", [squad(600), squad(601)])
    dropped = Counter()
    passages, questions = read(open_source(tmp_path), dropped)
    title, text = "University of Notre Dame", "The context of University_of_Notre_Dame."
    passage = Passage(content_id("squad", title, text), title, text)
    assert passages[-1] == passage and len(passages) == 101
    assert questions["test"][0] == Asked("600", "Question 600?", ("a", "b"), (Label(passage.id, title),))
    articles = {split: {each.labels[0].title for each in questions[split]} for split in ("train", "dev")}
    assert articles["dev"] and not articles["dev"] & articles["train"]
    assert dropped["questions without an answer"] == 1


def test_nq_open(tmp_path):
    write(tmp_path / "nq_open" / "train.parquet", [{"question": f"q{n}", "answer": ["a", "b"]} for n in range(99)])
    write(tmp_path / "nq_open" / "validation.parquet", [{"question": "v", "answer": ["c"]}])
    source = open_source(tmp_path / "nq_open")
    passages, questions = read(source)
    assert passages is None
    assert questions["test"] == [Asked(content_id("nq", "v"), "v", ("c",))]
    assert len(questions["train"]) + len(questions["dev"]) == 99 and questions["dev"]


def triviaqa(number, **changes):
    pages = {"doc_source": ["TagMe"], "filename": ["E.txt"], "title": ["England"], "wiki_context": ["England is\n"]}
    results = {"description": [""], "filename": ["1"], "rank": [0], "title": ["Web"], "url": [""]}
    answer = {"value": "York", "aliases": ["York", "Eboracum"], "normalized_value": "york", "type": "WikipediaEntity"}
    return {
        "question": f"Which city {number}?",
        "question_id": f"tc_{number}",
        "question_source": "",
        "entity_pages": pages,
        "search_results": results | {"search_context": ["York it is"]},
        "answer": answer,
    } | changes


def test_triviaqa(tmp_path):
    none = {"doc_source": [], "filename": [], "title": ["Only named"], "wiki_context": []}
    write(tmp_path / "train.parquet", [triviaqa(1), triviaqa(1), triviaqa(2, entity_pages=none)])
    write(tmp_path / "validation.parquet", [triviaqa(3)])
    write(tmp_path / "test.parquet", [triviaqa(4, answer={"value": "<unk>", "aliases": []})])
    dropped = Counter()
    passages, questions = read(open_source(tmp_path), dropped)
    page = Passage(content_id("triviaqa", "England", "England is\n"), "England", "England is")
    web = Passage(content_id("triviaqa", "Web", "York it is"), "Web", "York it is")
    assert passages == [page, web]
    labels = (Label(page.id, "England"), Label(web.id, "Web"))
    assert questions["test"] == [Asked("tc_3", "Which city 3?", ("York", "Eboracum"), labels)]
    (other,) = [each for each in questions["train"] + questions["dev"] if each.id == "tc_2"]
    assert other.labels == (Label(web.id, "Web"), Label("", "Only named"))
    assert dropped["questions whose id had been there already"] == 1
    for split in ("train", "validation"):
        (tmp_path / f"{split}.parquet").unlink()
    assert read(open_source(tmp_path))[1] == {"test": []}


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_mteb_in_folders(tmp_path, ending):
    write(tmp_path / "corpus" / f"corpus-00000-of-00001{ending}", [{"_id": "d1", "title": "", "text": "x"}])
    write(tmp_path / "queries" / f"queries-00000-of-00001{ending}", [{"_id": "1", "text": "q"}])
    judged = [{"query-id": "1", "corpus-id": "d1", "score": 1.0}, {"query-id": "1", "corpus-id": "d0", "score": 0.0}]
    write(tmp_path / "qrels" / f"test{ending}", judged)
    source = open_source(tmp_path)
    passages, questions = read(source)
    assert (source.layout, passages) == ("BEIR's layout", [Passage("d1", "", "x")])
    place = f"{tmp_path / 'qrels' / f'test{ending}'}, {'line' if ending == '.jsonl' else 'row'} 1"
    assert questions == {"test": [Asked("1", "q", (), (Label("d1", "", place),))]}


def test_beirs_hotpotqa_has_answers(tmp_path):
    write(tmp_path / "corpus.jsonl", [{"_id": "d1", "title": "", "text": "x"}])
    metadata = {"answer": "yes", "supporting_facts": []}
    write(tmp_path / "queries.jsonl", [{"_id": "1", "text": "q", "metadata": metadata}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("1\td1\t1\n")
    assert read(open_source(tmp_path))[1]["test"][0].answers == ("yes",)


def test_a_corpus_alone_may_be_a_file_or_a_folder_of_parts(tmp_path):
    (tmp_path / "psgs_w100.tsv").write_text("id\ttext\ttitle\n1\tA.\tT\n")
    assert list(open_corpus(tmp_path / "psgs_w100.tsv").passages(Counter())) == [Passage("1", "T", "A.")]
    for part in range(2):
        row = {"id": str(part), "url": "u", "title": f"T{part}", "text": "x"}
        write(tmp_path / "20231101.en" / f"train-0000{part}-of-00002.parquet", [row])
    source = open_corpus(tmp_path / "20231101.en")
    assert [passage.title for passage in source.passages(Counter())] == ["T0", "T1"] and not source.splits


def test_a_folder_that_is_nobodys(tmp_path):
    assert "has no data that ragjax knows" in fault_of(tmp_path)
    write(tmp_path / "fullwiki" / "train.parquet", [HOTPOT])
    assert "folders that have: name one of fullwiki" in fault_of(tmp_path)
    write(tmp_path / "train.parquet", [HOTPOT])
    write(tmp_path / "train.json", [HOTPOT])
    assert "has both train.json and train.parquet: remove" in fault_of(tmp_path)
    (tmp_path / "train.json").unlink()
    for name in ("dev", "validation"):
        write(tmp_path / f"{name}.parquet", [HOTPOT])
    assert "has both dev.parquet and validation.parquet" in fault_of(tmp_path)


def test_an_unknown_name_lists_those_that_are_known():
    with pytest.raises(UserError, match=r'no data folder "nothing": .* names hotpotqa, popqa, squad'):
        open_source("nothing")
    with pytest.raises(UserError, match="NQ-open.* has no passages"):
        open_corpus("nq_open")
