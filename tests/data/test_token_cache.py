"""The bounded cache of passages' tokens."""

import pytest

from ragjax.data.prompts import PromptBuilder
from ragjax.data.questions import Passage
from ragjax.data.token_cache import TokenCache


def test_what_is_kept_comes_back_as_it_was():
    cache = TokenCache(10)
    assert cache.get("a") is None
    cache["a"] = [7, 100_000, 0]
    assert cache.get("a") == [7, 100_000, 0]
    assert isinstance(cache.get("a"), list)
    cache.get("a").append(1)  # a copy
    assert cache.get("a") == [7, 100_000, 0]


def test_what_was_used_longest_ago_goes_first():
    cache = TokenCache(10)
    cache["a"], cache["b"], cache["c"] = [1] * 4, [2] * 4, [3] * 2
    assert cache.get("a") == [1] * 4  # so that b is the oldest
    cache["d"] = [4] * 3
    assert [cache.get(name) is not None for name in "abcd"] == [True, False, True, True]


def test_the_bound_is_in_tokens_and_holds_at_every_moment():
    cache = TokenCache(100)
    for i in range(200):
        cache[f"p{i % 70}"] = [i] * (i % 30)
        assert sum(len(cache.get(f"p{j}") or []) for j in range(70)) <= 100
    cache["long"] = [1] * 101
    assert cache.get("long") is None
    cache["p"] = [1] * 100
    assert cache.get("p") == [1] * 100


class CountingTokenizer:
    """A token a character; counts the texts it is given."""

    def __init__(self):
        self.texts = []

    def __call__(self, text, **options):
        self.texts.append(text)
        return {"input_ids": list(map(ord, text))}


@pytest.mark.parametrize(("limit", "times"), [(1000, 1), (4, 2)])
def test_a_prompt_is_the_same_whether_its_passage_was_kept_or_not(limit, times):
    """Also whether it counts as cut."""
    tokenizer = CountingTokenizer()
    prompts = PromptBuilder(tokenizer, 2, max_passage_tokens=4, window=1000)
    prompts._tokens = TokenCache(limit)
    passages = [Passage("a", "", "the town"), Passage("b", "", "a river")]
    first = prompts.prompt(passages, "Where?", reserve=1)
    assert prompts.prompt(passages, "Where?", reserve=1) == first
    assert first.cut == {"a", "b"}
    assert tokenizer.texts.count("the town") == times
