"""From what a source says of a question to its positives in a corpus."""

import pytest

from ragjax.data.passages import PassageList
from ragjax.data.preparing import labels
from ragjax.data.preparing.labels import Matcher, same_title, titles_of
from ragjax.data.questions import Passage
from ragjax.data.sources import Asked, Label
from ragjax.errors import UserError

CORPUS = [
    Passage("a1", "Malmö Harbour", "The heliport of Malmö opened in 1996."),
    Passage("a2", "malmö_harbour ", "It closed later."),
    Passage("a3", "Malmö harbour", "In 1996, it was busy."),
    Passage("b1", "Alone", "Nothing is said here."),
    Passage("c1", "Two", "yes and no"),
    Passage("c2", "Two", "no answer, yes"),
    Passage("d1", "", "1996"),
]


def positives(asked, corpus=CORPUS, *, document=None, **options):
    """(positives of each question, what became of the labels)."""
    matcher = Matcher({"test": asked}, **{"is_own": False} | options)
    for passage in corpus:
        matcher.see(passage, document(passage.id) if document else passage.id)
    found = {each.id: each.positive_ids for each in matcher.questions("test", PassageList(corpus))}
    return found, dict(matcher.counts)


def test_pages_by_title_and_answer():
    asked = [
        Asked("both", "?", ("nineteen", "1996"), (Label(title="Malmö Harbour"),)),
        Asked("none", "?", ("2001",), (Label(title="Malmö Harbour"),)),
        Asked("alone", "?", ("2001",), (Label(title="ALONE"), Label(title="Alone"))),
        Asked("unknown", "?", ("1996",), (Label(title="Lund"),)),
        Asked("title", "?", ("harbour",), (Label(title="malmö harbour"),)),
        Asked("part", "?", ("996",), (Label(title="malmö harbour"),)),
        Asked("nothing", "?", ("1996",), ()),
        Asked("yes", "?", ("Yes",), (Label(title="Two"),)),
        Asked("empty", "?", (), (Label(title="Two"),)),
    ]
    found, counts = positives(asked)
    assert found == {
        "both": ("a1", "a3"),
        "none": (),
        "alone": ("b1",),
        "unknown": (),
        "title": (),
        "part": (),
        "nothing": (),
        "yes": (),
        "empty": (),
    }
    assert counts == {
        labels.ANSWERED: 1,
        labels.UNDECIDED: 5,
        labels.ALONE: 2,
        labels.UNKNOWN: 1,
        labels.UNLABELLED: 7,
    }


def test_passages_of_ones_own_corpus_by_id():
    asked = [
        Asked("one", "?", ("x",), (Label("b1", "Malmö Harbour", "f, line 1"), Label("c2"), Label("b1"))),
        Asked("lost", "?", ("x",), (Label("gone", "Alone"),)),
    ]
    found, counts = positives(asked, is_own=True)
    assert found == {"one": ("b1", "c2"), "lost": ()}
    assert counts == {labels.NAMED: 3, labels.UNKNOWN: 1, labels.UNLABELLED: 1}
    faulty = [Asked("bad", "?", (), (Label("gone", "", "qrels/test.tsv, line 7"),))]
    with pytest.raises(UserError, match=r'^qrels/test.tsv, line 7: the positive id "gone" is not in the corpus; add'):
        positives(faulty, is_own=True)
    with pytest.raises(UserError, match='line 7: the positive id "gone" is not in the corpus'):
        positives(faulty, is_own=True, is_whole=False)


def test_documents_that_were_cut():
    corpus = [
        Passage("x#1", "Same", "the year 1996 was"),
        Passage("x#2", "Same", "another"),
        Passage("x#3", "Same", "until 1996"),
        Passage("y#1", "Same", "of 1996"),
    ]
    asked = [
        Asked("q1", "?", ("1996",), (Label("x"),)),
        Asked("q2", "?", ("2000",), (Label("x"), Label("y"))),
        Asked("q3", "?", ("1996",), (Label("z"),)),
    ]
    found, counts = positives(asked, corpus, document=lambda i: i.partition("#")[0], is_own=True, is_whole=False)
    assert found == {"q1": ("x#1", "x#3"), "q2": ("y#1",), "q3": ()}
    assert counts == {
        labels.ANSWERED: 1,
        labels.UNDECIDED: 1,
        labels.ALONE: 1,
        labels.UNKNOWN: 1,
        labels.UNLABELLED: 1,
    }


def test_ids_of_another_corpus_become_titles():
    own = [Passage("p1", "Alone", "."), Passage("p2", "", "."), Passage("a1", "Unused", ".")]
    asked = {"test": [Asked("q", "?", ("x",), (Label("p1"), Label("p2"), Label("p3"), Label("p4", "Alone")))]}
    titles = titles_of(asked, lambda: own)
    assert titles == {"p1": "Alone", "p2": ""}
    found, counts = positives(asked["test"], titles=titles)
    assert found == {"q": ("b1",)}
    assert counts == {labels.ALONE: 2, labels.NAMELESS: 2}
    # A passage that happens to have the id is not meant.
    assert positives([Asked("q", "?", ("x",), (Label("a1"),))])[0] == {"q": ()}
    assert titles_of({"test": [Asked("q", "?", ())]}, lambda: 1 / 0) == {}


def test_spellings_of_a_title():
    assert same_title("AC/DC_(Band) ") == same_title("ac/dc   (band)")
    assert same_title("Malmo\u0308") == same_title("MALM\u00d6")
    assert same_title("STRASSE") == same_title("Straße")
    assert same_title("Malmö") != same_title("Malmo")
    assert same_title("Apollo \u2460") != same_title("Apollo 1")
