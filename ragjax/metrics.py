"""Answer and retrieval metrics: one fraction in 0..1 per question.

Answers follow the two official scorers. Normalisation is SQuAD's (Rajpurkar et al. 2016): lower case, ASCII
punctuation dropped, the articles a / an / the dropped, white space collapsed, in that order. F1 counts shared
words and follows HotPotQA's rule (Yang et al. 2018): a normalised "yes", "no" or "noanswer" scores only by
being equal. That rule applies to every data set here. A question's value is the best over its accepted
answers.

Scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) have characters as their
words, as in the scorers of DRCD and CMRC 2018, and their punctuation ends a word. Text without them scores as the
official scorers have it.

For every prediction exact_match <= f1 and exact_match <= contains_answer.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WHOLE_OR_NOTHING = frozenset({"yes", "no", "noanswer"})
# Letters of scripts without spaces between words, as ranges of a regular expression. Hangul has spaces.
UNSPACED_RANGES = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3005\u3007\u3040-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_UNSPACED = re.compile(f"[{UNSPACED_RANGES}]")
# The full-width forms and the marks of these scripts: no text without them has any.
_UNSPACED_PUNCTUATION = re.compile(
    "[\u3001-\u3003\u3008-\u3020\u3030\u303d\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
    "\u0e2f\u0e4f\u0e5a\u0e5b\u0eaf\u104a\u104b\u17d4-\u17da]"
)
# Quotation marks, dashes and dots, which these scripts share with others.
_SHARED_PUNCTUATION = re.compile("[\u00b7\u2010-\u2027\u2030-\u205e]")


def normalize_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no articles, single spaces. May be empty.

    Characters of scripts without spaces stand apart, and punctuation of theirs is dropped.
    """
    text = _UNSPACED_PUNCTUATION.sub(" ", text)
    text = _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION))
    if _UNSPACED.search(text):
        text = _UNSPACED.sub(r" \g<0> ", _SHARED_PUNCTUATION.sub(" ", text))
    return " ".join(text.split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals an accepted answer after normalisation, else 0.0."""
    return _best(lambda guess, gold: float(guess == gold), prediction, answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of word precision and recall, best over the accepted answers.

    Repeated words count as often as both sides have them. If both sides are empty after normalisation the
    value is 1.0, as for exact_match.
    """
    return _best(_word_f1, prediction, answers)


def contains_answer(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if an accepted answer stands in the prediction at word boundaries, both normalised, else 0.0.

    This is the accuracy of PopQA (Mallen et al. 2023), made stricter. PopQA's own script looks for the raw
    answer, its lower-case or its capitalised form as any substring, so its accepted answer "pol" would be
    found in "police". Here no letter, digit or underscore may touch the answer on either side. An answer that
    is empty after normalisation is contained in an empty prediction only.
    """
    return _best(_contains, prediction, answers)


def recall_at_k(retrieved_ids: Sequence[Hashable], positive_ids: Iterable[Hashable], k: int) -> float | None:
    """Share of the positive passages among the first k retrieved; None for a question without positives.

    retrieved_ids stand best first; if fewer than k are given, all of them count.
    """
    found, positives = _found(retrieved_ids, positive_ids, k)
    return found / positives if positives else None


def hit_at_k(retrieved_ids: Sequence[Hashable], positive_ids: Iterable[Hashable], k: int) -> float | None:
    """1.0 if any positive passage is among the first k retrieved, else 0.0; None without positives."""
    found, positives = _found(retrieved_ids, positive_ids, k)
    return float(found > 0) if positives else None


def reciprocal_rank(retrieved_ids: Sequence[Hashable], positive_ids: Iterable[Hashable], k: int) -> float | None:
    """1 / rank of the first positive passage among the first k retrieved, 0.0 if there is none; None without positives.

    Its mean over questions is MRR@k (Voorhees 1999; MS MARCO takes k = 10).
    """
    _check_k(k)
    positives = set(positive_ids)
    ranks = (rank for rank, passage in enumerate(retrieved_ids[:k], start=1) if passage in positives)
    return 1 / next(ranks, math.inf) if positives else None


def answer_in_context(texts: Sequence[str], answers: Sequence[str], k: int) -> float:
    """1.0 if one of the first k passages' texts contains an accepted answer, as `contains_answer` has it, else 0.0.

    Needs no labelled passages: the answer recall of open-domain QA (Chen et al. 2017; Karpukhin et al. 2020, "top-k
    accuracy"). "yes" and "no" are found by chance.
    """
    _check_k(k)
    return max((contains_answer(text, answers) for text in texts[:k]), default=0.0)


def mean_of_defined(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None if there are none (recall over unlabelled questions)."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def _best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    """Best score of the normalised prediction against the normalised answers."""
    if isinstance(answers, str):  # would be read letter by letter
        raise TypeError("answers must be a sequence of strings, not one string")
    if not answers:
        raise ValueError("a question needs at least one accepted answer to be scored")
    guess = normalize_answer(prediction)
    return max(score(guess, normalize_answer(answer)) for answer in answers)


def _word_f1(guess: str, gold: str) -> float:
    if guess == gold:  # also where both are empty
        return 1.0
    if guess in _WHOLE_OR_NOTHING or gold in _WHOLE_OR_NOTHING:
        return 0.0
    guess_words, gold_words = guess.split(), gold.split()
    shared = (Counter(guess_words) & Counter(gold_words)).total()
    # 2PR/(P+R) with P = shared/len(guess) and R = shared/len(gold), in one rounding
    return 2 * shared / (len(guess_words) + len(gold_words))


def _contains(guess: str, gold: str) -> float:
    if not gold:
        return float(not guess)
    return float(re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", guess) is not None)


def _found(retrieved_ids: Sequence[Hashable], positive_ids: Iterable[Hashable], k: int) -> tuple[int, int]:
    """(positives among the first k, positives)."""
    _check_k(k)
    positives = set(positive_ids)
    return len(positives.intersection(retrieved_ids[:k])), len(positives)


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
