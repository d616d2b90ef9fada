"""Answers to questions whose passages are read in one prompt, or in one prompt each.

concat and rag_token decode from one mixture of prompts; rag_sequence decodes under each passage by itself and then
weighs the answers found by their probability under all of them (Lewis et al. 2020, arXiv 2005.11401, section 2.5).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt32

from ragjax.arrays import Ids, Variables
from ragjax.config import DecodeConfig
from ragjax.data.batches import length_bucket, pad_tokens, round_up
from ragjax.errors import DivergedError, UserError
from ragjax.generation import beam_search
from ragjax.generation.beam_search import Rule
from ragjax.generation.engines import Bound, Engine, OneCopy, engine_of
from ragjax.models.decoder import Decoder, for_decoding
from ragjax.parallel import Arrangement

# Between the seeds of two --sample_seed, so that their questions' draws are not the same ones in another order.
_SEED_STEP = 1_000_003


@runtime_checkable
class LanguageModel(Protocol):
    """What decoding needs to know of a generator."""

    @property
    def module(self) -> Decoder: ...

    @property
    def variables(self) -> Variables: ...

    @property
    def eos_token_id(self) -> int:
        """Ends a training answer."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Any of them ends a generated one."""


@dataclasses.dataclass(frozen=True)
class Decoded:
    """An answer in tokens."""

    tokens: list[int]  # without the end token
    log_prob: float  # log p(y|x) of the tokens and the end token
    tokens_read: int  # by the model for this question after its prompts, over all prompts and beams


class _Batch(NamedTuple):
    """Some questions with their prompts read."""

    chosen: list[int]  # their places among all questions
    log_weights: Float32[np.ndarray, "B K"]  # fillers included
    is_asked: Bool[np.ndarray, " B"]
    seeds: UInt32[np.ndarray, " B"]
    read: Any  # of their R = B * K prompts


def check_decoding(config: DecodeConfig) -> None:
    """Raises UserError where the settings contradict each other."""
    if config.temperature > 0 and (config.decode != "concat" or config.num_beams > 1):
        raise UserError(
            f"--temperature={config.temperature:g} samples answers, which needs --decode=concat and --num_beams=1: "
            "leave it out, or change those."
        )


def question_seeds(config: DecodeConfig, places: Iterable[int]) -> list[int]:
    """Seeds of the draws of the questions at `places`: the place alone counts, not the batch."""
    return [(config.sample_seed * _SEED_STEP + place) % 2**32 for place in places]


def decode_answers(
    model: LanguageModel,
    prompts: Sequence[Sequence[Ids]],
    log_weights: Float[np.ndarray, "n K"],
    config: DecodeConfig,
    batch_size: int,
    seeds: Sequence[int] | None = None,
) -> list[Decoded]:
    """The best answer to each question, or a drawn one, as the configuration says.

    Args:
      model: the generator.
      prompts: [n][K] token ids: one concatenated prompt (concat), or one a passage.
      log_weights: log p(z|x); zeros for concat.
      config: how answers are decoded.
      batch_size: questions decoded at once, on each of the devices that share them out.
      seeds: [n], of each question's draws; `question_seeds` of all places by default.
    """
    check_decoding(config)
    rule = _rule(model, config)
    if config.decode == "rag_sequence":
        is_thorough = config.decode_variant == "thorough"
        return decode_sequence(model, prompts, log_weights, rule, batch_size, is_thorough)
    if seeds is None:
        seeds = question_seeds(config, range(len(prompts)))
    return decode_mixture(model, prompts, log_weights, rule, batch_size, seeds)


class Prepared(NamedTuple):
    """A language model with its decoder in the form that takes steps fastest: see `prepare`."""

    module: Decoder
    variables: Variables
    eos_token_id: int
    end_ids: tuple[int, ...]
    steps: Bound  # the decoder and its variables, for what follows the prompts
    engine: Engine

    decode_answers = decode_answers


def prepare(model: LanguageModel, arrangement: Arrangement | None = None) -> Prepared:
    """The model for several calls of what follows, each of which would prepare it by itself.

    On CPU this copies the decoder's layers. Elsewhere a layer is read where it lies in the stack, and there may be no
    room for a copy.

    Args:
      model: the generator.
      arrangement: of the devices that share the questions out; None: the weights are used where they lie.
    """
    if isinstance(model, Prepared):
        return model
    reader: Bound = model.module, model.variables
    steps = for_decoding(*reader) if jax.default_backend() == "cpu" else reader
    engine = OneCopy(reader, steps) if arrangement is None else engine_of(reader, steps, arrangement)
    return Prepared(*reader, model.eos_token_id, model.end_ids, steps, engine)


def decode_mixture(
    model: LanguageModel,
    prompts: Sequence[Sequence[Ids]],
    log_weights: Float[np.ndarray, "n K"],
    rule: Rule,
    batch_size: int,
    seeds: Sequence[int] | None = None,
) -> list[Decoded]:
    """The likeliest answers, or drawn ones, where each token is predicted by the mixture of a question's prompts.

    Args:
      model: the generator.
      prompts: [n][K] token ids; K = 1 for concatenated passages.
      log_weights: log p(z|x); zeros where K = 1.
      rule: how answers are found.
      batch_size: questions decoded at once.
      seeds: [n], of each question's draws; their places by default.

    Returns:
      For each question the best answer. Its log_prob is that of RAG-Token (-rag_token_nll) unless it was drawn
      or ended with another end token than the training's, eos_token_id.
    """
    prepared, results = prepare(model), dict[int, Decoded]()
    for batch in _batches(prepared, prompts, log_weights, batch_size, seeds):
        found = _found(prepared, batch, batch.log_weights, batch.is_asked, batch.seeds, rule)
        read = batch.log_weights.shape[1] * rule.num_beams
        for i, answers in zip(batch.chosen, found, strict=False):
            tokens, log_prob = answers[0]
            results[i] = Decoded(tokens, log_prob, read * len(tokens))
    return [results[i] for i in range(len(prompts))]


def decode_sequence(
    model: LanguageModel,
    prompts: Sequence[Sequence[Ids]],
    log_weights: Float[np.ndarray, "n K"],
    rule: Rule,
    batch_size: int,
    is_thorough: bool,
) -> list[Decoded]:
    """The answers of the largest sum_z p(z|x) p(y|x,z) among those found under each passage by itself.

    Args:
      model, prompts, log_weights, rule, batch_size: as in `decode_mixture`.
      is_thorough: every answer is scored under every passage; False: an answer's probability is taken as 0 under the
        passages under which it was not found.
    """
    prepared, results = prepare(model), dict[int, Decoded]()
    for batch in _batches(prepared, prompts, log_weights, batch_size, None):
        size, passages = batch.log_weights.shape
        count = size * passages  # of prompts, each searched as if it were a question of its own
        alone = np.zeros((count, 1), np.float32)
        found = _found(prepared, batch, alone, np.repeat(batch.is_asked, passages), np.zeros(count, np.uint32), rule)
        groups = [found[first : first + passages] for first in range(0, count, passages)]
        hypotheses = [list(dict.fromkeys(tuple(ids) for beams in group for ids, _ in beams)) for group in groups]
        if is_thorough:
            scores = _rescored(prepared, batch, hypotheses, passages * rule.num_beams)
        else:
            scores = np.full((size, passages, max(map(len, hypotheses))), -np.inf)
            for b, group in enumerate(groups):
                for k, beams in enumerate(group):
                    for ids, log_prob in beams:
                        scores[b, k, hypotheses[b].index(tuple(ids))] = log_prob
        totals = np.logaddexp.reduce(batch.log_weights[:, :, None] + scores.astype(np.float64), axis=1)
        for b, i in enumerate(batch.chosen):
            lengths = list(map(len, hypotheses[b]))
            best = int(np.argmax(totals[b, : len(lengths)]))
            read = sum(len(ids) for beams in groups[b] for ids, _ in beams) + is_thorough * passages * sum(lengths)
            results[i] = Decoded(list(hypotheses[b][best]), float(totals[b, best]), read)
    return [results[i] for i in range(len(prompts))]


def stream_answer(
    model: LanguageModel, prompts: Sequence[Ids], log_weights: Float[np.ndarray, " K"], config: DecodeConfig
) -> Iterator[list[int]]:
    """The tokens so far of the answer that `decode_answers` finds for one question, after each new one.

    For greedy and drawn answers of concat and rag_token: those of others are not known before the end.
    """
    rule, prepared = _rule(model, config), prepare(model)
    if not isinstance(prepared.engine, OneCopy):
        raise ValueError("one question is not shared out: give the model as it is")
    (batch,) = _batches(prepared, [prompts], np.asarray(log_weights)[None], 1, question_seeds(config, [0]))
    fixed = (batch.log_weights, batch.seeds)
    last, read = batch.read
    state = beam_search.begin(*prepared.steps, last, fixed[0], batch.is_asked, fixed[1], rule)
    while beam_search.is_unfinished(state):
        yield np.asarray(state.tokens)[0, 0, : int(state.step)].tolist()
        until = state.step + 1
        state = beam_search.advance(*prepared.steps, read, *fixed, state, until, rule)
    _refuse_diverged(np.asarray(state.ended_scores))


def can_stream(config: DecodeConfig) -> bool:
    """Whether `stream_answer` serves this configuration."""
    return config.decode != "rag_sequence" and config.num_beams == 1


def _rule(model: LanguageModel, config: DecodeConfig) -> Rule:
    return Rule(config.max_new_tokens, model.end_ids, config.num_beams, config.temperature, config.top_p)


def _batches(
    model: Prepared,
    prompts: Sequence[Sequence[Ids]],
    log_weights: Float[np.ndarray, "n K"],
    batch_size: int,
    seeds: Sequence[int] | None,
) -> Iterator[_Batch]:
    """Questions whose prompts are of like length together, filled up to `batch_size` for each copy."""
    order = sorted(range(len(prompts)), key=lambda i: max(map(len, prompts[i])))
    batch_size *= model.engine.copies
    seeds = range(len(prompts)) if seeds is None else seeds
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        passages = len(prompts[chosen[0]])
        ids = [prompt for i in chosen for prompt in prompts[i]]
        tokens, lengths = pad_tokens(ids, batch_size * passages, length_bucket(max(map(len, ids))))
        weights = np.zeros((batch_size, passages), np.float32)
        weights[: len(chosen)] = [log_weights[i] for i in chosen]
        drawn_from = np.zeros(batch_size, np.uint32)
        drawn_from[: len(chosen)] = [seeds[i] for i in chosen]
        read = model.engine.read(tokens, lengths)
        yield _Batch(chosen, weights, np.arange(batch_size) < len(chosen), drawn_from, read)


def _found(
    model: Prepared,
    batch: _Batch,
    log_weights: Float32[np.ndarray, "B K"],
    is_asked: Bool[np.ndarray, " B"],
    seeds: UInt32[np.ndarray, " B"],
    rule: Rule,
) -> list[list[tuple[list[int], float]]]:
    """(tokens, log-probability) of each question's answers, best first, none for fillers."""
    tokens, lengths, scores = model.engine.search(batch.read, log_weights, is_asked, seeds, rule)
    _refuse_diverged(scores[is_asked])
    return [
        [
            (tokens[b, q, : lengths[b, q]].tolist(), float(scores[b, q]))
            for q in range(rule.num_beams)
            if np.isfinite(scores[b, q])
        ]
        for b in range(len(tokens))
    ]


def _refuse_diverged(scores: Float[np.ndarray, "B Q"]) -> None:
    """Raises DivergedError where a question has no answer. scores: best first."""
    if not np.isfinite(scores[:, 0]).all():
        raise DivergedError(
            "the generator's probabilities are not finite: if it was trained it has diverged, so lower --generator_lr; "
            "else its weights are damaged, or too large for --dtype"
        )


def _rescored(
    model: Prepared, batch: _Batch, hypotheses: Sequence[Sequence[tuple[int, ...]]], most: int
) -> Float32[np.ndarray, "B K U"]:
    """log p(y|x,z) of every question's hypotheses, at most `most` each, under all of its passages."""
    ended = [[[*ids, model.eos_token_id] for ids in answers] for answers in hypotheses]
    longest = max(len(ids) for answers in ended for ids in answers)
    padded = [pad_tokens(answers, most, round_up(longest, 8)) for answers in ended]
    tokens, lengths = (np.stack(parts) for parts in zip(*padded, strict=True))
    return model.engine.score(batch.read, tokens, lengths)
