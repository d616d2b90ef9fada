"""Metrics against cases worked by hand (fixtures/answer_metrics.json) and their invariants."""

import json
import re
import string
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragjax import metrics

CASES = json.loads((Path(__file__).parent / "fixtures" / "answer_metrics.json").read_text(encoding="utf-8"))

# Few letters and words, so that random texts often share words, hold articles or normalise to nothing.
WORDS = st.sampled_from(
    ["the", "a", "An", "yes", "no.", "noanswer", "paris", "Paris!", "pol", "polis", "...", "–", "é"]
)
TEXTS = st.one_of(
    st.lists(WORDS, max_size=6).map(" ".join), st.text("aAntheyso.- –é'_", max_size=12), st.text(max_size=20)
)
ANSWERS = st.lists(TEXTS, min_size=1, max_size=4)


@pytest.mark.parametrize(("text", "expected"), CASES["normalize"])
def test_normalize_answer(text, expected):
    assert metrics.normalize_answer(text) == expected


@pytest.mark.parametrize("case", CASES["scores"], ids=lambda case: f"{case['prediction']}|{case['answers']}")
def test_scores_worked_by_hand(case):
    prediction, answers = case["prediction"], case["answers"]
    assert metrics.exact_match(prediction, answers) == float(Fraction(case["em"]))
    assert metrics.f1(prediction, answers) == pytest.approx(float(Fraction(case["f1"])), abs=1e-15)
    assert metrics.contains_answer(prediction, answers) == float(Fraction(case["contains"]))


@given(TEXTS, ANSWERS)
def test_exact_match_is_never_above_f1_or_containment(prediction, answers):
    em = metrics.exact_match(prediction, answers)
    assert em <= metrics.f1(prediction, answers) <= 1.0
    assert em <= metrics.contains_answer(prediction, answers)


@given(ANSWERS, st.data())
def test_an_accepted_answer_scores_one_in_every_metric(answers, data):
    prediction = data.draw(st.sampled_from(answers))
    for metric in (metrics.exact_match, metrics.f1, metrics.contains_answer):
        assert metric(prediction, answers) == 1.0


@given(TEXTS, ANSWERS, TEXTS)
def test_a_further_answer_never_lowers_a_score(prediction, answers, further):
    for metric in (metrics.exact_match, metrics.f1, metrics.contains_answer):
        assert metric(prediction, [further, *answers]) >= metric(prediction, answers)


@given(TEXTS, TEXTS)
def test_f1_and_exact_match_are_symmetric(one, other):
    assert metrics.f1(one, [other]) == metrics.f1(other, [one])
    assert metrics.exact_match(one, [other]) == metrics.exact_match(other, [one])


@given(TEXTS)
def test_normalisation_is_idempotent(text):
    once = metrics.normalize_answer(text)
    assert metrics.normalize_answer(once) == once


@pytest.mark.parametrize("metric", [metrics.exact_match, metrics.f1, metrics.contains_answer])
def test_one_string_or_no_answer_is_refused(metric):
    with pytest.raises(TypeError, match="sequence of strings"):
        metric("Paris", "Paris")
    with pytest.raises(ValueError, match="at least one accepted answer"):
        metric("Paris", [])


@pytest.mark.parametrize(
    ("retrieved", "positives", "k", "recall", "hit"),
    [
        (["a", "b", "c"], ["a"], 1, 1.0, 1.0),
        (["a", "b", "c"], ["c"], 2, 0.0, 0.0),  # found only beyond k
        (["a", "b", "c"], ["c", "x"], 3, 0.5, 1.0),
        (["a", "b", "c", "d", "e"], ["e", "b", "x", "y"], 5, 0.5, 1.0),
        (["a", "b"], ["b"], 5, 1.0, 1.0),  # fewer retrieved than k
        ([], ["b"], 5, 0.0, 0.0),
        (["a", "a", "b"], ["a", "b"], 2, 0.5, 1.0),  # a passage found twice counts once
        (["a", "b"], ["a", "a"], 2, 1.0, 1.0),  # a positive named twice counts once
        (["a", "b"], [], 2, None, None),
        ([3, 1], [1], 2, 1.0, 1.0),  # row numbers serve as well
    ],
)
def test_recall_and_hit(retrieved, positives, k, recall, hit):
    assert metrics.recall_at_k(retrieved, positives, k) == recall
    assert metrics.hit_at_k(retrieved, positives, k) == hit


@pytest.mark.parametrize("metric", [metrics.recall_at_k, metrics.hit_at_k])
def test_k_below_one_is_refused(metric):
    with pytest.raises(ValueError, match="at least 1"):
        metric(["a"], ["a"], 0)


def test_mean_leaves_undefined_values_out():
    assert metrics.mean_of_defined([1.0, None, 0.5]) == 0.75
    assert metrics.mean_of_defined([None]) is None
    assert metrics.mean_of_defined([]) is None


# --- ranks and contexts


def test_the_reciprocal_rank_is_of_the_first_positive():
    found = ["a", "b", "c", "d"]
    assert metrics.reciprocal_rank(found, ["a"], 4) == 1.0
    assert metrics.reciprocal_rank(found, ["d", "c"], 4) == pytest.approx(1 / 3)
    assert metrics.reciprocal_rank(found, ["d"], 3) == 0.0
    assert metrics.reciprocal_rank(found, ["x"], 10) == 0.0
    assert metrics.reciprocal_rank([], ["x"], 10) == 0.0
    assert metrics.reciprocal_rank(found, [], 4) is None
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        metrics.reciprocal_rank(found, ["a"], 0)


def test_an_answer_is_looked_for_in_the_first_k_texts():
    texts = ["The town lies in Poland.", "Łódź is polite.", "He was born in 1987, in the Pol."]
    assert metrics.answer_in_context(texts, ["poland"], 1) == 1.0
    assert metrics.answer_in_context(texts, ["1987"], 2) == 0.0
    assert metrics.answer_in_context(texts, ["Krakow", "1987"], 3) == 1.0
    assert metrics.answer_in_context(texts[:2], ["pol"], 5) == 0.0  # at word boundaries
    assert metrics.answer_in_context([], ["pol"], 5) == 0.0
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        metrics.answer_in_context(texts, ["poland"], 0)


@pytest.mark.parametrize(
    ("prediction", "answer", "em", "f1", "contains"),
    [
        ("北京。", "北京", 1, 1, 1),
        ("「北京」", "北京", 1, 1, 1),
        ("“北京”……", "北京", 1, 1, 1),
        ("北京市", "北京", 0, 4 / 5, 1),  # 2 of 3 characters, 2 of 2
        ("首都是北京市", "北京", 0, 4 / 8, 1),
        ("東京", "北京", 0, 1 / 2, 0),
        ("日本の東京です", "東京", 0, 4 / 9, 1),
        ("サッカー", "サッカ", 0, 6 / 7, 1),
        ("กรุงเทพมหานคร", "กรุงเทพ", 0, 14 / 20, 1),
        ("ວຽງຈັນ", "ວຽງຈັນ", 1, 1, 1),
        ("ភ្នំពេញ។", "ភ្នំពេញ", 1, 1, 1),
        ("ရန်ကုန်", "ရန်", 0, 6 / 10, 1),
        ("买iPhone手机", "iPhone", 0, 2 / 5, 1),  # 买, iphone, 手, 机
        ("iPhones", "iPhone", 0, 0, 0),
        ("서울 시", "서울", 0, 2 / 3, 1),  # Hangul has spaces
        ("서울시", "서울", 0, 0, 0),
    ],
)
def test_scripts_without_spaces_have_characters_as_words(prediction, answer, em, f1, contains):
    assert metrics.exact_match(prediction, [answer]) == em
    assert metrics.f1(prediction, [answer]) == pytest.approx(f1)
    assert metrics.contains_answer(prediction, [answer]) == contains
    assert metrics.answer_in_context(["", prediction], [answer], 2) == contains


def official_normal_form(text: str) -> str:
    """SQuAD's, step by step."""
    kept = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


@pytest.mark.parametrize(
    "text",
    [
        "The U.S.-led   coalition",
        "“Quoted” – and dashed — text…",
        "Łódź · São Paulo, 12‰",
        "an A, the THE a",
        "naïve café’s 3½",
        "yes.",
        "Москва (Moscow); Αθήνα",
        "서울 the city",
        "",
    ],
)
def test_other_scripts_have_the_official_normal_form(text):
    assert metrics.normalize_answer(text) == official_normal_form(text)


@given(st.text(st.characters(max_codepoint=0xDFF)))
def test_any_text_below_those_scripts_has_the_official_normal_form(text):
    assert metrics.normalize_answer(text) == official_normal_form(text)
