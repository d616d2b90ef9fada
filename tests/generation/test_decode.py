"""ragjax.generation: cached, batched, compiled decoding equals loops that compute everything anew.

Greedy and drawn answers against the tiny model's plain logits; mixtures and beams against the probabilities of every
answer of up to four tokens over a vocabulary of five.
"""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax import losses, pretrained
from ragjax.config import DecodeConfig
from ragjax.errors import DivergedError
from ragjax.generation import Rule, beam_search, decode, decode_answers, decode_mixture, decode_sequence, stream_answer
from ragjax.models.lora import LoraConfig
from ragjax.pretrained import init_lora, load_generator
from tests.tiny import write_tiny_llama
from tests.tiny_modules import tiny_decoder

NEW = 9
LENGTHS = (11, 1, 17, 5)
ROWS = len(LENGTHS)
NEVER = (-1,)  # the vocabulary's last token, which ends none of the greedy texts


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return load_generator(write_tiny_llama(tmp_path_factory.mktemp("llama"), seed=3))


@pytest.fixture(scope="module")
def prompts(generator) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, generator.config.vocab_size, length).tolist() for length in LENGTHS]


def plain_loop(generator, prompt: list[int], steps: int) -> list[int]:
    """Likeliest tokens one after the other, each from the whole text so far; no cache, no batch, no end."""
    text = list(prompt)
    for _ in range(steps):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(text)] = text
        logits = np.asarray(generator.logits(padded, np.array([len(text)])))
        text.append(int(logits[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


@pytest.fixture(scope="module")
def expected(generator, prompts) -> list[list[int]]:
    """What each prompt goes on with; the texts must differ, else rows could be mixed up unseen."""
    texts = [plain_loop(generator, prompt, NEW) for prompt in prompts]
    assert len({tuple(text) for text in texts}) == len(texts)
    assert not any(generator.config.vocab_size - 1 in text for text in texts)
    return texts


@pytest.fixture(scope="module")
def ends(expected) -> tuple[int, ...]:
    """End tokens of which one ends row 0 in the middle, and one ends row 1 at once; row 2 meets neither."""
    middle = next(token for token in expected[0][2:] if token not in expected[0][:2] + expected[2])
    at_once = expected[1][0]
    assert at_once not in expected[0] + expected[2]
    return middle, at_once


def decoded(generator, prompts, ends, rows=ROWS) -> list[list[int]]:
    """Greedy texts in batches of `rows`."""
    found = decode_mixture(generator, [[ids] for ids in prompts], np.zeros((len(prompts), 1)), Rule(NEW, ends), rows)
    return [answer.tokens for answer in found]


def cut(text: list[int], ends: tuple[int, ...]) -> list[int]:
    """The text up to its first end token."""
    return text[: next((i for i, token in enumerate(text) if token in ends), len(text))]


def test_rows_of_any_length_go_on_as_in_a_plain_loop(generator, prompts, expected):
    assert decoded(generator, prompts, NEVER) == expected


def test_stacked_layers_give_the_same_tokens(generator, prompts, ends, monkeypatch):
    """As other devices than CPUs read them."""
    unstacked = decoded(generator, prompts, ends)
    monkeypatch.setattr(decode.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(decode, "for_decoding", None)  # not to be called
    assert decoded(generator, prompts, ends) == unstacked


def test_adapters_are_part_of_the_model(generator, prompts, expected):
    with_lora = load_generator(generator.source.path, lora=LoraConfig(4, 8.0, 0.0, ("q_proj", "v_proj", "down_proj")))
    lora = jax.tree.map(lambda leaf: leaf + 0.3, init_lora(with_lora, 0))
    with_lora = dataclasses.replace(with_lora, lora=lora)
    texts = [plain_loop(with_lora, prompt, NEW) for prompt in prompts]
    assert texts != expected
    assert decoded(with_lora, prompts, NEVER) == texts


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_layers_decode_too(generator, prompts, kind):
    quantised = load_generator(generator.source.path, quantize=kind)
    assert decoded(quantised, prompts, NEVER) == [plain_loop(quantised, prompt, NEW) for prompt in prompts]


def test_each_of_several_end_tokens_ends_its_row_alone(generator, prompts, expected, ends):
    wanted = [cut(text, ends) for text in expected]
    assert len(set(map(len, wanted))) > 2
    assert decoded(generator, prompts, ends) == wanted


def test_an_end_token_at_once_leaves_no_text(generator, prompts, expected, ends):
    assert expected[1][0] in ends
    assert decoded(generator, prompts, ends)[1] == []


def test_a_row_is_the_same_alone_in_any_company_and_under_any_padding(generator, prompts, ends):
    together = decoded(generator, prompts, ends)
    for prompt, text in zip(prompts, together, strict=True):
        assert decoded(generator, [prompt], ends) == [text]
    assert decoded(generator, prompts[::-1], ends)[::-1] == together
    long = np.random.default_rng(1).integers(3, generator.config.vocab_size, 70).tolist()
    assert decoded(generator, [*prompts, long], ends, rows=6)[:-1] == together


def test_prompts_of_any_length_share_a_few_compiled_programs(generator):
    """A program for every multiple of 64 made eight here, and took longer to compile than to decode."""
    beam_search.prefill.clear_cache()
    beam_search.advance.clear_cache()
    rng = np.random.default_rng(2)
    many = [rng.integers(3, generator.config.vocab_size, length).tolist() for length in range(520, 1020, 10)]
    found = decoded(generator, many, NEVER, rows=4)
    lengths = [640, 768, 896, 1024]
    assert beam_search.prefill._cache_size() == beam_search.advance._cache_size() == len(lengths)
    # More padding changes nothing: the same prompts, read beside one that is longer.
    assert decoded(generator, [*many[::20], many[-1]], NEVER, rows=6) == [*found[::20], found[-1]]
    assert beam_search.prefill._cache_size() == len(lengths) + 1  # six rows


def test_scores_of_any_length_share_a_few_compiled_programs(generator):
    rng = np.random.default_rng(2)
    pairs = [rng.integers(3, generator.config.vocab_size, length).tolist() for length in range(520, 1020, 10)]
    pretrained._score.clear_cache()
    found = generator.score_tokens(pairs, [[5, 2]] * len(pairs))
    assert pretrained._score._cache_size() == 4
    for i in (0, 20, 49):
        logits = np.asarray(generator.logits(np.array([[*pairs[i], 5]])))[0]
        expected = jax.nn.log_softmax(logits)[[-2, -1], [5, 2]]
        np.testing.assert_allclose(found[i], expected, atol=2e-5)


def test_decoding_stops_as_soon_as_every_row_has_ended(generator, prompts, expected, ends, monkeypatch):
    finished = []
    advance = beam_search.advance
    monkeypatch.setattr(beam_search, "advance", lambda *arguments: finished.append(advance(*arguments)) or finished[-1])
    few = [cut(text, ends) for text in expected[:2]]  # and two fillers, which must not keep the loop going
    assert 0 < max(map(len, few)) < NEW
    for some, texts in ((prompts[:2], few), (prompts, [cut(text, ends) for text in expected])):
        decoded(generator, some, ends)
        # One choice more than tokens: the end.
        assert int(finished.pop().step) == max(map(len, texts)) + 1


def test_a_stream_grows_into_the_greedy_answer(generator, prompts, expected, ends):
    ending = dataclasses.replace(generator, end_ids=ends)
    for prompt, text in zip(prompts, expected, strict=True):
        whole = cut(text, ends)
        parts = list(stream_answer(ending, [prompt], np.zeros(1), DecodeConfig(max_new_tokens=NEW)))
        assert parts == [whole[: n + 1] for n in range(len(whole))]


def test_the_public_method_keeps_the_order_of_its_prompts(generator, prompts, expected):
    """`generate_tokens` groups by length, two at a time here; without the right order back, texts swap places."""
    unending = dataclasses.replace(generator, end_ids=NEVER)
    assert unending.generate_tokens(prompts, NEW, batch_size=2) == expected
    assert unending.generate_tokens([], NEW) == []


# --- mixtures and beams, by enumeration: token 0 ends an answer

VOCABULARY, LONGEST, PASSAGES = 5, 4, 3
ENOUGH = 4**LONGEST + 1  # beams that hold every unfinished answer


@pytest.fixture(scope="module")
def tiny():
    """A generator whose next tokens are far from even, and two questions under three passages each."""
    module, variables = tiny_decoder(seed=70, vocab_size=VOCABULARY)
    head = variables["params"]["lm_head"]
    variables = {"params": variables["params"] | {"lm_head": jax.tree.map(lambda leaf: 4.0 * leaf, head)}}
    rng = np.random.default_rng(4)
    prompts = [[rng.integers(1, VOCABULARY, rng.integers(2, 9)).tolist() for _ in range(PASSAGES)] for _ in range(2)]
    log_weights = np.log(rng.dirichlet(np.ones(PASSAGES), 2)).astype(np.float32)
    model = SimpleNamespace(module=module, variables=variables, eos_token_id=0, end_ids=(0,))
    return SimpleNamespace(model=model, prompts=prompts, log_weights=log_weights)


ANSWERS = [ids for n in range(LONGEST + 1) for ids in itertools.product(range(1, VOCABULARY), repeat=n)]


@pytest.fixture(scope="module")
def token_log_probs(tiny) -> np.ndarray:
    """[question, answer, passage, token] of every answer and its end, 0 behind it, from whole texts without a cache."""
    width = 16
    call = jax.jit(functools.partial(tiny.model.module.apply, method="full_logits"))
    result = np.zeros((2, len(ANSWERS), PASSAGES, LONGEST + 1))
    for b, k in np.ndindex(2, PASSAGES):
        prompt = tiny.prompts[b][k]
        tokens, segments = (np.zeros((len(ANSWERS), width), int) for _ in range(2))
        for row, ids in enumerate(ANSWERS):
            tokens[row, : len(prompt) + len(ids)] = [*prompt, *ids]
            segments[row, : len(prompt) + len(ids)] = 1
        positions = np.broadcast_to(np.arange(width), tokens.shape)
        logits = np.asarray(call(tiny.model.variables, tokens, segments, positions), np.float64)
        for row, ids in enumerate(ANSWERS):
            for t, token in enumerate((*ids, 0)):
                scores = logits[row, len(prompt) - 1 + t]
                result[b, row, k, t] = scores[token] - np.log(np.exp(scores).sum())
    return result


def best_first(scores: np.ndarray) -> list[tuple[float, tuple[int, ...]]]:
    return sorted(zip(scores.tolist(), ANSWERS, strict=True), reverse=True)


@pytest.fixture(scope="module")
def sequence_scores(tiny, token_log_probs) -> np.ndarray:
    """[question, answer]: log sum_z p(z|x) prod_t p(y_t|x,z,y_<t)."""
    return np.log(np.exp(tiny.log_weights[:, None] + token_log_probs.sum(axis=-1)).sum(axis=-1))


@pytest.fixture(scope="module")
def token_scores(tiny, token_log_probs) -> np.ndarray:
    """[question, answer]: sum_t log sum_z p(z|x) p(y_t|x,z,y_<t)."""
    is_real = token_log_probs.any(axis=2)
    mixed = np.log(np.exp(tiny.log_weights[:, None, :, None] + token_log_probs).sum(axis=2))
    return np.where(is_real, mixed, 0.0).sum(axis=-1)


def nll(loss, tiny, token_log_probs, b: int, ids) -> float:
    """A training loss of one answer."""
    row, mask = ANSWERS.index(tuple(ids)), np.arange(LONGEST + 1) < len(ids) + 1
    arguments = (tiny.log_weights[b : b + 1], token_log_probs[b, row][None], mask[None])
    return float(loss(*map(jnp.asarray, arguments))[0])


def test_the_two_questions_are_hard(tiny, sequence_scores, token_scores):
    """The answers differ between the models and from greedy ones, so that a mixed-up search shows."""
    greedy = decode_mixture(tiny.model, tiny.prompts, tiny.log_weights, Rule(LONGEST, (0,)), 2)
    best = [[best_first(scores[b])[0][1] for b in range(2)] for scores in (sequence_scores, token_scores)]
    assert any(tuple(answer.tokens) != ids for answer, ids in zip(greedy, best[1], strict=True))
    assert best[0] != best[1]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rag_token_with_enough_beams_finds_the_likeliest_answer(tiny, token_log_probs, token_scores, batch_size):
    found = decode_mixture(tiny.model, tiny.prompts, tiny.log_weights, Rule(LONGEST, (0,), ENOUGH), batch_size)
    for b, answer in enumerate(found):
        score, ids = best_first(token_scores[b])[0]
        assert tuple(answer.tokens) == ids
        assert answer.log_prob == pytest.approx(score, abs=1e-5)
        assert answer.log_prob == pytest.approx(-nll(losses.rag_token_nll, tiny, token_log_probs, b, ids), abs=1e-5)


def test_a_mixture_streams_too(tiny):
    config = DecodeConfig(decode="rag_token", max_new_tokens=LONGEST)
    found = decode_answers(tiny.model, tiny.prompts, tiny.log_weights, config, 2)
    assert any(answer.tokens for answer in found)
    for answer, prompts, weights in zip(found, tiny.prompts, tiny.log_weights, strict=True):
        parts = list(stream_answer(tiny.model, prompts, weights, config))
        assert parts == [answer.tokens[: n + 1] for n in range(len(answer.tokens))]


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_few_beams_equal_a_plain_search(tiny, token_log_probs, token_scores, beams):
    """Of all continuations the `beams` likeliest; ended ones are kept, the likeliest others fill the beams up."""
    found = decode_mixture(tiny.model, tiny.prompts, tiny.log_weights, Rule(LONGEST, (0,), beams), 2)
    mixed = np.log(np.exp(tiny.log_weights[:, None, :, None] + token_log_probs).sum(axis=2))
    for b, answer in enumerate(found):
        prefix = {ids: mixed[b, row, : len(ids)].sum() for row, ids in enumerate(ANSWERS)}
        whole = dict(zip(ANSWERS, token_scores[b].tolist(), strict=True))
        alive, ended = [()], {}
        for _ in range(LONGEST):
            going = sorted(((*ids, t) for ids in alive for t in range(1, VOCABULARY)), key=prefix.get)[::-1][:beams]
            scored = [(prefix[ids], 0, ids) for ids in going] + [(whole[ids], 1, ids) for ids in alive]
            ended |= {ids: score for score, is_end, ids in sorted(scored)[::-1][:beams] if is_end}
            alive = going
            if len(ended) >= beams and sorted(ended.values())[-beams] >= prefix[alive[0]]:
                break
        else:
            ended |= {ids: whole[ids] for ids in alive}
        best = max(ended, key=ended.get)
        assert tuple(answer.tokens) == best
        assert answer.log_prob == pytest.approx(ended[best], abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_thorough_rag_sequence_finds_the_likeliest_answer(tiny, token_log_probs, sequence_scores, batch_size):
    rule = Rule(LONGEST, (0,), ENOUGH)
    found = decode_sequence(tiny.model, tiny.prompts, tiny.log_weights, rule, batch_size, is_thorough=True)
    for b, answer in enumerate(found):
        score, ids = best_first(sequence_scores[b])[0]
        assert tuple(answer.tokens) == ids
        assert answer.log_prob == pytest.approx(score, abs=1e-5)
        assert answer.log_prob == pytest.approx(-nll(losses.rag_sequence_nll, tiny, token_log_probs, b, ids), abs=1e-5)


@pytest.mark.parametrize("is_thorough", [True, False])
def test_rag_sequence_weighs_what_each_passage_finds(tiny, token_log_probs, sequence_scores, is_thorough):
    """Two beams a passage. Fast counts an answer only under the passages that found it."""
    found = decode_sequence(tiny.model, tiny.prompts, tiny.log_weights, Rule(LONGEST, (0,), 2), 2, is_thorough)
    under = token_log_probs.sum(axis=-1)
    for b, answer in enumerate(found):
        totals = {}
        for k in range(PASSAGES):
            (state,) = state_under(tiny, b, k)
            for ids, _ in state:
                row = ANSWERS.index(ids)
                share = np.exp(tiny.log_weights[b, k] + under[b, row, k])
                totals[ids] = totals.get(ids, 0.0) + share
                if is_thorough:
                    totals[ids] = np.exp(sequence_scores[b, row])
        best = max(totals, key=totals.get)
        assert tuple(answer.tokens) == best
        assert answer.log_prob == pytest.approx(np.log(totals[best]), abs=1e-5)


def test_a_search_goes_on_until_the_last_of_its_answers_is_sure(tiny, token_log_probs):
    """Not only the best one: RAG-Sequence weighs them all."""
    for b, k in ((0, 0), (1, 2)):
        (found,) = state_under(tiny, b, k, beams=ENOUGH)
        under = best_first(token_log_probs[b, :, k].sum(axis=-1))
        assert [ids for ids, _ in found[:20]] == [ids for _, ids in under[:20]]
        np.testing.assert_allclose([score for _, score in found[:20]], [score for score, _ in under[:20]], atol=1e-5)


def state_under(tiny, b: int, k: int, beams: int = 2):
    """The best answers under one passage by itself: what `decode_mixture` searches, all of them."""
    rule, weights, asked, seeds = Rule(LONGEST, (0,), beams), np.zeros((1, 1)), np.array([True]), np.zeros(1, np.uint32)
    ids = tiny.prompts[b][k]
    model = tiny.model
    last, prompts = beam_search.prefill(model.module, model.variables, np.array([ids]), np.array([len(ids)]))
    state = beam_search.begin(model.module, model.variables, last, weights, asked, seeds, rule)
    state = beam_search.advance(model.module, model.variables, prompts, weights, seeds, state, LONGEST + 1, rule)
    tokens, lengths, scores = map(np.asarray, (state.ended_tokens, state.ended_lengths, state.ended_scores))
    yield [(tuple(tokens[0, q, : lengths[0, q]].tolist()), scores[0, q]) for q in range(beams)]


# --- drawn answers


def test_draws_follow_the_model(tiny, token_log_probs):
    """Shares of 4,000 draws at temperature 1 against the probabilities of whole answers under one prompt."""
    under = np.exp(token_log_probs[0, :, 0].sum(axis=-1))
    draws = 4000
    rule = Rule(LONGEST, (0,), temperature=1.0)
    prompts = [[tiny.prompts[0][0]]] * draws
    found = decode_mixture(tiny.model, prompts, np.zeros((draws, 1)), rule, draws)
    counts = dict.fromkeys(ANSWERS, 0)
    for answer in found:
        counts[tuple(answer.tokens)] += 1
    short = [i for i, ids in enumerate(ANSWERS) if len(ids) < LONGEST]  # the longest ones are cut off, not ended
    shares = np.array([counts[ANSWERS[i]] for i in short]) / draws
    np.testing.assert_allclose(shares, under[short], atol=4 * np.sqrt(0.25 / draws))
    assert shares.sum() == pytest.approx(under[short].sum(), abs=4 * np.sqrt(0.25 / draws))


def test_a_small_nucleus_or_a_low_temperature_is_greedy(generator, prompts, expected):
    weights = np.zeros((ROWS, 1))
    for rule in (Rule(NEW, NEVER, temperature=1.0, top_p=1e-6), Rule(NEW, NEVER, temperature=1e-4)):
        found = decode_mixture(generator, [[ids] for ids in prompts], weights, rule, ROWS)
        assert [answer.tokens for answer in found] == expected


def test_draws_depend_on_the_seed_and_not_on_the_batch(generator, prompts):
    rule, weights = Rule(NEW, NEVER, temperature=1.5), np.zeros((ROWS, 1))

    def draw(order, batch_size, seeds):
        found = decode_mixture(
            generator, [[prompts[i]] for i in order], weights, rule, batch_size, [seeds[i] for i in order]
        )
        return {i: answer.tokens for i, answer in zip(order, found, strict=True)}

    one = draw([0, 1, 2, 3], 4, (7, 8, 9, 10))
    assert draw([3, 1, 0, 2], 3, (7, 8, 9, 10)) == one
    assert all(draw([0, 1, 2, 3], 4, (17, 18, 19, 20))[i] != one[i] for i in range(ROWS))


def test_a_configuration_s_seed_decides_its_draws(generator, prompts):
    """Also one that fills more than the 32 bits of a seed; a stream draws as the first question of a batch does."""

    def draw(seed):
        config = DecodeConfig(temperature=1.5, max_new_tokens=NEW, sample_seed=seed)
        found = decode_answers(generator, [[ids] for ids in prompts], np.zeros((ROWS, 1)), config, ROWS)
        *_, last = stream_answer(generator, [prompts[0]], np.zeros(1), config)
        assert found[0].tokens == last
        return [answer.tokens for answer in found]

    assert draw(5) == draw(5)
    assert all(one != other for one, other in itertools.combinations([*draw(0), *draw(1), *draw(5_000_000_000)], 2))


@pytest.mark.parametrize("decode", ["concat", "rag_sequence"])
def test_a_generator_that_has_diverged_is_refused(generator, prompts, decode):
    broken = dataclasses.replace(generator, params=jax.tree.map(lambda leaf: leaf * np.nan, generator.params))
    config = DecodeConfig(decode=decode, max_new_tokens=NEW)
    with pytest.raises(
        DivergedError, match="if it was trained it has diverged, so lower --generator_lr; else its weights are damaged"
    ):
        decode_answers(broken, [[prompts[0]]], np.zeros((1, 1)), config, 2)
    if decode == "concat":
        with pytest.raises(DivergedError):
            list(stream_answer(broken, [prompts[0]], np.zeros(1), config))


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9])
def test_a_nucleus_holds_the_likeliest_tokens(top_p):
    """Hand-worked: of shares .5 .3 .15 .05, p = .3 leaves one, .6 two and .9 three."""
    log_probs = np.log(np.array([0.15, 0.5, 0.05, 0.3], np.float32))
    rule = Rule(1, (0,), temperature=1.0, top_p=top_p)
    drawn = jax.vmap(lambda seed: beam_search._draw(jnp.asarray(log_probs)[None, None], seed[None], 0, rule))(
        jnp.arange(400, dtype=jnp.uint32)
    )
    assert set(np.asarray(drawn).ravel().tolist()) == {0.3: {1}, 0.6: {1, 3}, 0.9: {1, 3, 0}}[top_p]
