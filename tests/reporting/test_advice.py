"""The advice, on findings written by hand: what is chosen, and that no sentence claims more than the intervals."""

import pytest

from ragjax.reporting import LABELS, advise
from ragjax.reporting.advice import is_real
from ragjax.reporting.findings import METRICS, CellFindings, PairFindings, RowFindings

NOT_KNOWN = dict.fromkeys(METRICS)


def row(name, f1, seconds, change=None, behind=None, seeds=(0,), recall=None, unselected=(), failure=""):
    """change, behind: (mean, low, high) of F1."""
    cells = tuple(CellFindings(name, seed, f"runs/{name}", failure, None, unselected) for seed in seeds)
    return RowFindings(
        name,
        LABELS[name],
        () if failure else seeds,
        (failure,) if failure else (),
        NOT_KNOWN if failure else NOT_KNOWN | {"f1": f1, "em": f1, "recall_at_5": recall},
        NOT_KNOWN | {"f1": change},
        NOT_KNOWN | {"f1": behind},
        None if failure else seconds,
        None,
        {},
        cells,
    )


def pair(*rows, best, n=200, labelled=200, metric="f1"):
    counts = dict.fromkeys(METRICS, n) | {"recall_at_5": labelled}
    return PairFindings("minilm", "smollm2", "test", n, counts, {"f1": 0.1}, metric, best, rows)


def test_the_cheapest_of_those_within_chance_is_taken():
    advice = advise(
        pair(
            row("none", 0.1, 10.0, behind=(0.31, 0.25, 0.37)),
            row("generator", 0.38, 100.0, change=(0.28, 0.2, 0.36), behind=(0.03, -0.01, 0.07)),
            row("independent", 0.36, 110.0, change=(0.26, 0.2, 0.3), behind=(0.05, 0.01, 0.09)),
            row("two_phase", 0.41, 250.0, change=(0.31, 0.25, 0.37)),
            best="two_phase",
        )
    )
    assert advice.choice == "generator"
    assert advice.as_good == ("generator", "two_phase")
    assert advice.verdict.startswith("Take Ft. Gen.: F1 38.0 % for 1.7 min of training, the cheapest of the 2 rows")
    text = " ".join(advice.reasons)
    assert "its lead of +3.0 points [-1.0, +7.0] over Ft. Gen. is within chance, and it takes 2.50 times" in text
    assert "ahead beyond chance, in points of F1, of No Ft. +31.0 [+25.0, +37.0] and Indp. +5.0 [+1.0, +9.0]." in text
    assert "advise Indp., which is behind 2-Phase here." in text
    # (0.04 / 0.03)^2 * 200 = 356
    assert "about 360 questions, instead of 200," in advice.would_change[0]


def test_the_one_ahead_of_all_is_taken_whatever_it_costs():
    advice = advise(
        pair(
            row("generator", 0.3, 100.0, change=(0.2, 0.1, 0.3), behind=(0.1, 0.05, 0.15)),
            row("rag_token", 0.4, 900.0, change=(0.3, 0.2, 0.4)),
            best="rag_token",
        )
    )
    assert advice.choice == "rag_token"
    assert advice.verdict == "Take RAG-Tok.: its F1 of 40.0 % is ahead of all others beyond chance."


def test_nothing_learned_beyond_chance():
    advice = advise(
        pair(
            row("none", 0.1, 10.0, behind=(0.02, -0.01, 0.05)),
            row("generator", 0.115, 100.0, change=(0.015, -0.01, 0.04), behind=(0.005, -0.1, 0.1)),
            row("rag_token", 0.12, 900.0, change=(0.02, -0.01, 0.05)),
            best="rag_token",
        )
    )
    assert advice.choice == "none"
    assert advice.as_good == ("none", "generator", "rag_token")
    assert "nothing was learned beyond chance" in advice.verdict
    assert "+2.0 points [-1.0, +5.0]" in advice.verdict


def test_a_clear_gain_beside_an_unclear_best_is_not_hidden():
    advice = advise(
        pair(
            row("none", 0.1, 10.0, behind=(0.02, -0.01, 0.05)),
            row("generator", 0.115, 100.0, change=(0.015, 0.01, 0.02), behind=(0.005, -0.1, 0.1)),
            row("rag_token", 0.12, 900.0, change=(0.02, -0.01, 0.05)),
            best="rag_token",
        )
    )
    assert advice.choice == "none"
    assert "nothing was learned" not in advice.verdict
    assert any("Taken alone" in line and "Ft. Gen. +1.5 [+1.0, +2.0]" in line for line in advice.reasons)


def test_the_untrained_models_are_the_best():
    advice = advise(
        pair(
            row("none", 0.2, 10.0),
            row("generator", 0.1, 100.0, change=(-0.1, -0.15, -0.05), behind=(0.1, 0.05, 0.15)),
            best="none",
        )
    )
    assert advice.choice == "none"
    assert "no strategy has a higher F1" in advice.verdict
    assert any("No Ft. is ahead beyond chance" in line and "Ft. Gen. +10.0" in line for line in advice.reasons)


@pytest.mark.parametrize(
    ("change", "choice", "words"),
    [
        ((0.2, 0.1, 0.3), "generator", "Ft. Gen. works: F1 goes from 10.0 % to 30.0 %"),
        ((0.2, -0.1, 0.5), "none", "nothing was learned beyond chance"),
        ((-0.2, -0.3, -0.1), "none", "Ft. Gen. lowers F1 by -20.0 points"),
    ],
)
def test_a_run_by_itself(change, choice, words):
    advice = advise(pair(row("generator", 0.3, 100.0, change=change), best="generator"))
    assert advice.choice == choice
    assert words in advice.verdict
    assert "2-Phase" in advice.unknown[-1]
    assert not any("Lawton" in line for line in advice.lines)


@pytest.mark.parametrize("n", [1, 5])
def test_so_few_questions_bear_no_claim(n):
    """Their bootstrap intervals may have no width, and would look certain."""
    rows = row("none", 0.0, 10.0, behind=(1.0, 1.0, 1.0)), row("generator", 1.0, 100.0, change=(1.0, 1.0, 1.0))
    advice = advise(pair(*rows, best="generator", n=n, labelled=n))
    assert advice.choice is None
    assert advice.verdict.startswith(f"{n} question{'s' if n > 1 else ''} cannot tell")
    assert advice.reasons == ()
    assert not is_real((1.0, 1.0, 1.0), n)
    assert is_real((1.0, 1.0, 1.0), 6)


def test_an_interval_that_touches_zero_is_within_chance():
    assert not is_real((0.1, 0.0, 0.2), 200)
    assert not is_real(None, 200)
    assert is_real((-0.1, -0.2, -0.01), 200)


def test_what_is_not_known():
    advice = advise(
        pair(
            row("generator", 0.3, 100.0, change=(0.2, 0.1, 0.3), unselected=("generator",)),
            row("independent", None, None, failure="No training question has positive_ids."),
            best="generator",
            labelled=0,
        )
    )
    assert "Indp., seed 0, has no result: No training question has positive_ids." in advice.unknown
    text = " ".join(advice.unknown)
    for words in ("One seed", "Recall@5 is not known", "best state of generator", "were not tried"):
        assert words in text
    text = " ".join(advice.would_change)
    for words in ("--seed", "positive_ids", "dev split"):
        assert words in text


@pytest.mark.parametrize(
    ("labelled", "searched", "words"),
    [
        (200, False, "passages are labelled, Lawton et al. (2025, section 6) advise Indp., which has no result here"),
        (0, True, "learning rates are open, Lawton et al. (2025, section 6) advise 2-Phase, which is within chance"),
        (0, False, "rates are known, Lawton et al. (2025, section 6) advise RAG-Seq. or RAG-Tok., which has the best"),
    ],
)
def test_the_papers_advice_follows_labels_and_rates(labelled, searched, words):
    rows = (
        row("two_phase", 0.3, 100.0, change=(0.2, 0.1, 0.3), behind=(0.1, -0.1, 0.3)),
        row("rag_token", 0.4, 90.0, change=(0.3, 0.2, 0.4)),
    )
    assert words in advise(pair(*rows, best="rag_token", labelled=labelled), searched).reasons[-1]


def test_no_result():
    advice = advise(pair(row("rag_token", None, None, failure="It diverged."), best=None, metric=None, n=0, labelled=0))
    assert advice.choice is None
    assert advice.verdict == "No run has a result, so there is nothing to choose from."
    assert advice.lines[1] == "RAG-Tok., seed 0, has no result: It diverged."
