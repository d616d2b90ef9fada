"""Beam search for the likeliest answers under a mixture of prompts, compiled whole.

A question has K prompts with weights: one prompt of all its passages (K = 1), or one a passage, whose next-token
distributions are mixed in every step (RAG-Token decoding; Lewis et al. 2020, arXiv 2005.11401, section 2.5). The K
prompts of B questions form one batch and are read once; beams are branches that share their prompt.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int, Int32, Shaped, UInt32

from ragjax.arrays import AnyArray, Array, Variables
from ragjax.models.decoder import Decoder, Prompts, Slots, empty_slots, unstack
from ragjax.scoring import target_log_probs


@dataclasses.dataclass(frozen=True)
class Rule:
    """How answers are found."""

    max_new_tokens: int  # T, the end token not counted
    end_ids: tuple[int, ...]  # any of them ends an answer
    num_beams: int = 1  # Q; 1 is greedy
    temperature: float = 0.0  # above 0: one answer is drawn, Q = 1
    top_p: float = 1.0  # drawn from the likeliest tokens that hold this probability


class Beams(NamedTuple):
    """Where a search for answers stands: Q unfinished answers a question, and the Q best finished ones, best first."""

    step: Int32[Array, ""]  # tokens chosen so far in each unfinished answer
    tokens: Int32[Array, "B Q T"]
    scores: Float32[Array, "B Q"]  # log-probabilities; -inf: no answer
    visible: Bool[Array, "B Q C"]  # the slots that hold the answer's own tokens
    slots: Slots | Sequence[Slots]  # C = Q * T, in order of arrival
    ended_tokens: Int32[Array, "B Q T"]  # without the end token
    ended_lengths: Int32[Array, "B Q"]
    ended_scores: Float32[Array, "B Q"]  # log-probabilities, the end token's included


@functools.partial(jax.jit, static_argnames=("module", "is_unstacked"))
def prefill(
    module: Decoder,
    variables: Variables,
    tokens: Int[AnyArray, "R S"],
    lengths: Int[AnyArray, " R"],
    is_unstacked: bool = False,
) -> tuple[Float[Array, "R D"], Prompts]:
    """Reads right-padded prompts: (their last hidden states, their slots).

    Unstacked slots are for the decoder that `for_decoding` gives.
    """
    hidden, prompts = module.bind(variables).prefill(tokens, lengths)
    if is_unstacked:
        prompts = prompts._replace(slots=unstack(prompts.slots))
    return hidden[jnp.arange(len(lengths)), jnp.maximum(lengths - 1, 0)], prompts


@functools.partial(jax.jit, static_argnames=("module", "rule"))
def begin(
    module: Decoder,
    variables: Variables,
    last: Float[AnyArray, "R D"],
    log_weights: Float[AnyArray, "B K"],
    is_asked: Bool[AnyArray, " B"],
    seeds: UInt32[AnyArray, " B"],
    rule: Rule,
) -> Beams:
    """The beams after their first choice.

    Args:
      module: the decoder.
      variables: its collections.
      last: last hidden states of the R = B * K prompts.
      log_weights: log p(z|x) of the prompts.
      is_asked: False for a filler, which has no answer.
      seeds: of the questions' draws.
      rule: how answers are found.
    """
    questions, width, length = len(is_asked), rule.num_beams, rule.max_new_tokens
    nothing = jnp.full((questions, width), -jnp.inf)
    beams = Beams(
        step=jnp.int32(0),
        tokens=jnp.zeros((questions, width, length), jnp.int32),
        scores=nothing.at[:, 0].set(jnp.where(is_asked, 0.0, -jnp.inf)),
        visible=jnp.zeros((questions, width, width * length), bool),
        slots=empty_slots(module.config, len(last), width * length),
        ended_tokens=jnp.zeros((questions, width, length), jnp.int32),
        ended_lengths=jnp.zeros((questions, width), jnp.int32),
        ended_scores=nothing,
    )
    log_probs = _mixed_log_probs(module, variables, last[:, None], log_weights)
    return _choose(beams, jnp.broadcast_to(log_probs, (questions, width, log_probs.shape[-1])), seeds, rule)


@functools.partial(jax.jit, static_argnames=("module", "rule"), donate_argnames="beams")
def advance(
    module: Decoder,
    variables: Variables,
    prompts: Prompts,
    log_weights: Float[AnyArray, "B K"],
    seeds: UInt32[AnyArray, " B"],
    beams: Beams,
    until: Int[AnyArray, ""] | int,
    rule: Rule,
) -> Beams:
    """Extends beams until every question has its best answers, or `until` steps are done.

    An answer that is max_new_tokens long can only end. A question is finished when none of its unfinished answers is
    likelier than its Q-th finished one: adding tokens makes no answer likelier, so more steps would change nothing.

    Args:
      module, variables, log_weights, seeds, rule: as given to `begin`.
      prompts: what `prefill` returned.
      beams: where they stand; their arrays' memory is used up.
      until: max_new_tokens + 1 to go to the end.
    """

    def step_once(beams: Beams) -> Beams:
        hidden, beams = _feed(module, variables, prompts, beams, rule)
        return _choose(beams, _mixed_log_probs(module, variables, hidden, log_weights), seeds, rule)

    return jax.lax.while_loop(lambda beams: (beams.step < until) & is_unfinished(beams), step_once, beams)


def is_unfinished(beams: Beams) -> Bool[Array, ""]:
    return jnp.any(beams.scores > -jnp.inf)


def _feed(
    module: Decoder, variables: Variables, prompts: Prompts, beams: Beams, rule: Rule
) -> tuple[Float[Array, "R Q D"], Beams]:
    """Lets the model read the tokens that were chosen last: hidden states."""
    per_question = len(prompts.lengths) // len(beams.tokens)
    width, step = rule.num_beams, beams.step - 1
    branches, slots = jnp.arange(width), jnp.arange(width * rule.max_new_tokens)
    beams = beams._replace(visible=beams.visible | (slots == step * width + branches[:, None]))
    hidden, new_slots = module.bind(variables).extend(
        jnp.repeat(beams.tokens[:, :, step], per_question, axis=0),
        jnp.full(width, step),
        jnp.repeat(beams.visible, per_question, axis=0),
        prompts,
        beams.slots,
        slots // width,
        step * width,
    )
    return hidden, beams._replace(slots=new_slots)


def _mixed_log_probs(
    module: Decoder, variables: Variables, hidden: Float[AnyArray, "R Q D"], log_weights: Float[AnyArray, "B K"]
) -> Float32[Array, "B Q V"]:
    """log sum_z p(z|x) p(next token | z, ...) from the hidden states of R = B * K prompts."""
    log_probs = jax.nn.log_softmax(module.bind(variables).logits(hidden))
    log_probs = log_probs.reshape(*log_weights.shape, *log_probs.shape[1:])
    return jax.nn.logsumexp(log_probs + log_weights[:, :, None, None], axis=1)


def _choose(beams: Beams, log_probs: Float32[Array, "B Q V"], seeds: UInt32[AnyArray, " B"], rule: Rule) -> Beams:
    """One more token for every unfinished answer, given log_probs of what follows them.

    Of all continuations the Q likeliest count. Those of them that end are finished answers; the others, filled up to
    Q, go on.
    """
    step, vocabulary = beams.step, log_probs.shape[-1]
    ends = jnp.asarray(rule.end_ids)
    is_full = step == rule.max_new_tokens
    if rule.temperature > 0:
        drawn = _draw(log_probs, seeds, step, rule)
        log_probs = jnp.where(is_full | (jnp.arange(vocabulary) == drawn[..., None]), log_probs, -jnp.inf)
    totals = beams.scores[:, :, None] + log_probs
    ending = totals[:, :, ends].max(axis=-1)
    totals = jnp.where(is_full, -jnp.inf, totals.at[:, :, ends].set(-jnp.inf))
    scores, flat = jax.lax.top_k(totals.reshape(len(totals), -1), rule.num_beams)
    least = jax.lax.top_k(jnp.concatenate([scores, ending], axis=1), rule.num_beams)[0][:, -1:]

    ended_scores, order = jax.lax.top_k(
        jnp.concatenate([beams.ended_scores, jnp.where(ending >= least, ending, -jnp.inf)], axis=1), rule.num_beams
    )
    ended_tokens = _pick(jnp.concatenate([beams.ended_tokens, beams.tokens], axis=1), order)
    lengths = jnp.broadcast_to(step, ending.shape)
    ended_lengths = _pick(jnp.concatenate([beams.ended_lengths, lengths], axis=1), order)

    parents = flat // vocabulary
    tokens = jnp.where(
        jnp.arange(rule.max_new_tokens) == step, (flat % vocabulary)[..., None], _pick(beams.tokens, parents)
    )
    is_done = scores[:, :1] <= ended_scores[:, -1:]
    return Beams(
        step=step + 1,
        tokens=tokens,
        scores=jnp.where(is_done, -jnp.inf, scores),
        visible=_pick(beams.visible, parents),
        slots=beams.slots,
        ended_tokens=ended_tokens,
        ended_lengths=ended_lengths,
        ended_scores=ended_scores,
    )


def _draw(
    log_probs: Float32[Array, "B Q V"], seeds: UInt32[AnyArray, " B"], step: Int[AnyArray, ""] | int, rule: Rule
) -> Int[Array, "B Q"]:
    """A token for each answer: nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751).

    The draw depends on the question's seed and the step alone, never on the other questions.
    """
    logits = log_probs / rule.temperature
    if rule.top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered)
        # By the probability of all likelier tokens, so the likeliest always stays.
        is_kept = jnp.cumsum(probabilities, axis=-1) - probabilities < rule.top_p
        least = jnp.min(ordered, axis=-1, keepdims=True, where=is_kept, initial=jnp.inf)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds)
    return jax.vmap(jax.random.categorical)(keys, logits)


def _pick(values: Shaped[Array, "B n *rest"], order: Int[Array, "B Q"]) -> Shaped[Array, "B Q *rest"]:
    """Values at `order` of their second axis."""
    return jnp.take_along_axis(values, order.reshape(*order.shape, *[1] * (values.ndim - 2)), axis=1)


@functools.partial(jax.jit, static_argnames="module")
def score_continuations(
    module: Decoder,
    variables: Variables,
    last: Float[AnyArray, "R D"],
    prompts: Prompts,
    tokens: Int[AnyArray, "B U T"],
    lengths: Int[AnyArray, "B U"],
) -> Float32[Array, "B K U"]:
    """log p(y|x, z) of U answers under each of their question's K prompts, which are not read again.

    Args:
      module: the decoder.
      variables: its collections.
      last, prompts: what `prefill` returned for R = B * K prompts.
      tokens: the answers, end tokens included, right-padded.
      lengths: theirs.
    """
    length, prompt_count = tokens.shape[-1], len(last)
    per_question = prompt_count // len(tokens)
    steps = jnp.arange(length - 1)  # the last token is never read
    visible = jnp.broadcast_to(steps[:, None] >= steps, (prompt_count, length - 1, length - 1))

    def score(answer: tuple[Int[Array, "B T"], Int[Array, " B"]]) -> Float32[Array, "B K"]:
        targets, lengths = (jnp.repeat(part, per_question, axis=0) for part in answer)
        slots = empty_slots(module.config, prompt_count, length - 1)
        hidden, _ = module.bind(variables).extend(targets[:, :-1], steps, visible, prompts, slots, steps, 0)
        states = jnp.concatenate([last[:, None], hidden], axis=1)
        log_probs = target_log_probs(module, variables, states.reshape(-1, states.shape[-1]), targets.reshape(-1))
        is_real = jnp.arange(length) < lengths[:, None]
        return jnp.sum(log_probs.reshape(targets.shape), axis=-1, where=is_real).reshape(-1, per_question)

    # One answer of every question after the other: attention's scores of all of them would not fit.
    return jnp.moveaxis(jax.lax.map(score, (tokens.swapaxes(0, 1), lengths.swapaxes(0, 1))), 0, -1)
