"""Rotary positions (Su et al. 2021, arXiv 2104.09864) and the ways in which models stretch them to longer texts.

A pair of a head's numbers turns by position times frequency, theta^(-2i / H) for pair i. config.json names what
becomes of the frequencies in `rope_scaling`, or in `rope_parameters` as transformers v5 writes it:

    linear    all divided by one factor (Chen et al. 2023, arXiv 2306.15595)
    dynamic   theta grows with the text's own length beyond the trained one ("NTK-aware")
    yarn      slow pairs divided, fast ones kept, and the scores sharpened (Peng et al. 2023, arXiv 2309.00071)
    llama3    the same with Llama 3.1's borders (Grattafiori et al. 2024, arXiv 2407.21783)
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int

from ragjax.arrays import AnyArray, Array
from ragjax.errors import UserError
from ragjax.settings import Settings, listed

# Keys beside the scaling's own: which it is, what is read elsewhere, and a remark about how the model was trained.
_BESIDE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """No scaling, and what the kinds share."""

    attention_factor = 1.0  # what queries and keys are multiplied with besides being turned

    def frequencies(self, theta: float, width: int, lengths: Int[AnyArray, "*texts"]) -> Float[AnyArray, "..."]:
        """Frequencies [H/2] in radians a token, or [..., H/2] where they follow the `lengths` [...] of texts."""
        return _plain(theta, width)


@dataclasses.dataclass(frozen=True)
class LinearRope(RopeScaling):
    """All frequencies are divided by `factor`."""

    factor: float

    def frequencies(self, theta: float, width: int, lengths: Int[AnyArray, "*texts"]) -> Float[np.ndarray, " half"]:
        return _plain(theta, width) / self.factor


@dataclasses.dataclass(frozen=True)
class DynamicRope(RopeScaling):
    """A text of L tokens beyond the trained length is read with theta * (factor * L / trained - factor + 1)^(H/(H-2)).

    The length is the text's own, as in transformers with one text at a time. A cached step counts the tokens so far:
    keys stay as they were turned when they were read.
    """

    factor: float
    max_position_embeddings: int

    def frequencies(self, theta: float, width: int, lengths: Int[AnyArray, "*texts"]) -> Float[Array, "*texts half"]:
        stretch = jnp.maximum(lengths, self.max_position_embeddings) / self.max_position_embeddings
        growth = (self.factor * stretch - (self.factor - 1)) ** (width / (width - 2))
        # In logarithms: theta itself may be large, and float32 has seven digits.
        logarithm = jnp.log(growth) + math.log(theta)
        return jnp.exp(-logarithm[..., None] * _exponents(width).astype(np.float32))


@dataclasses.dataclass(frozen=True)
class YarnRope(RopeScaling):
    """Pairs that turn more than `beta_fast` times within the original context stay, those that turn less than
    `beta_slow` times are divided by `factor`, and in between the two are mixed by the pair's number."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # whether the borders are rounded outwards to whole pairs

    def frequencies(self, theta: float, width: int, lengths: Int[AnyArray, "*texts"]) -> Float[np.ndarray, " half"]:
        def pair_that_turns(times: float) -> float:
            turns = self.original_max_position_embeddings / (2 * math.pi * times)
            return width * math.log(turns) / (2 * math.log(theta))

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 if low == high else 0.0
        slowed = np.clip((np.arange(width // 2) - low) / (high - low), 0.0, 1.0)
        return _plain(theta, width) * (1.0 - slowed + slowed / self.factor)


@dataclasses.dataclass(frozen=True)
class Llama3Rope(RopeScaling):
    """Turns of more than original / low_freq_factor tokens are slowed by `factor`, those of fewer than
    original / high_freq_factor stay, and in between the two are mixed."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def frequencies(self, theta: float, width: int, lengths: Int[AnyArray, "*texts"]) -> Float[np.ndarray, " half"]:
        frequencies = _plain(theta, width)
        turns = self.original_max_position_embeddings * frequencies / (2 * np.pi)  # in the original context
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = np.clip(share, 0.0, 1.0)
        return (share + (1.0 - share) / self.factor) * frequencies


def _plain(theta: float, width: int) -> Float[np.ndarray, " half"]:
    return theta ** -_exponents(width)


def _exponents(width: int) -> Float[np.ndarray, " half"]:
    return np.arange(0, width, 2) / width


def rotary_angles(
    positions: Int[AnyArray, "R S"], lengths: Int[AnyArray, "R S"], theta: float, width: int, scaling: RopeScaling
) -> Float32[Array, "R S half"]:
    """Rotation angles [R, S, H/2] of tokens at `positions` in texts of `lengths` tokens."""
    frequencies = scaling.frequencies(theta, width, lengths)
    return jnp.asarray(positions)[..., None].astype(jnp.float32) * frequencies.astype(np.float32)


def text_lengths(segment_ids: Int[AnyArray, "R S"], positions: Int[AnyArray, "R S"]) -> Int[Array, "R S"]:
    """Tokens of the text that each token belongs to; positions count from 0 in every segment."""
    own = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.max(jnp.where(own, positions[:, None, :], 0), axis=-1) + 1


def rotate(
    x: Float[Array, "R S N H"], angles: Float32[Array, "R S half"], scaling: RopeScaling
) -> Float[Array, "R S N H"]:
    """Turns the pairs (i, i + H/2) of every head of `x` by `angles` [R, S, H/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return (turned * scaling.attention_factor).astype(x.dtype)


# ---- config.json -------------------------------------------------------------------------------------------


def read_rope(config: Settings) -> tuple[float, RopeScaling]:
    """theta and the scaling that a config.json of either spelling asks for.

    Raises:
      UserError: naming a kind, a key or a value that is not followed, or a key that is missing.
    """
    old, new = config.section("rope_scaling"), config.section("rope_parameters")
    if old and new and old != new:
        raise UserError(f"{config.where} has a rope_scaling that differs from its rope_parameters: remove one of them.")
    given = old or new
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise UserError(
            f"{config.where} has the rope type {kind!r} in {given.inside}, but this decoder supports only "
            f"{listed(SCALINGS)}: choose another model."
        )
    for each in (given, config):
        if each.get("partial_rotary_factor") is not None and each.number("partial_rotary_factor") != 1:
            raise each.fault("partial_rotary_factor", ", but this decoder supports only 1.")
    followed, make = SCALINGS[kind]
    if unknown := sorted(given.keys() - followed - _BESIDE):
        raise given.fault(
            unknown[0],
            f", which is not followed for the rope type {kind!r}: remove it if it changes nothing, or choose another "
            "model.",
        )
    theta = (given if "rope_theta" in given else config).number("rope_theta", 10000.0, above=1)
    return theta, make(given, config)


def _trained(config: Settings) -> int:
    return config.integer("max_position_embeddings")


def _original(given: Settings, config: Settings) -> int:
    """The length before stretching: beside the scaling (transformers lets that win), inside it, or the model's."""
    return (config if config.get(_ORIGINAL) is not None else given).integer(_ORIGINAL, _trained(config))


def _dynamic(given: Settings, config: Settings) -> DynamicRope:
    # Below 1 a long text's theta would become negative.
    return DynamicRope(given.number("factor", least=1), _trained(config))


def _yarn(given: Settings, config: Settings) -> YarnRope:
    original = _original(given, config)
    factor = given.number("factor", _trained(config) / original)
    if "attention_factor" in given:
        attention = given.number("attention_factor")
    elif given.get("mscale") and given.get("mscale_all_dim"):
        attention = _yarn_attention(factor, given.number("mscale")) / _yarn_attention(
            factor, given.number("mscale_all_dim")
        )
    else:
        attention = _yarn_attention(factor)
    return YarnRope(
        factor,
        original,
        attention,
        given.number("beta_fast", 32.0),
        given.number("beta_slow", 1.0),
        given.boolean("truncate", True),
    )


def _yarn_attention(factor: float, scale: float = 1.0) -> float:
    """The temperature that the YaRN paper found, section 3.4."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(given: Settings, config: Settings) -> Llama3Rope:
    low, high = given.number("low_freq_factor"), given.number("high_freq_factor")
    if low >= high:
        raise given.fault("low_freq_factor", f", which is not below high_freq_factor = {high}: correct it.")
    return Llama3Rope(given.number("factor"), low, high, _original(given, config))


_ORIGINAL = "original_max_position_embeddings"

# The rope types that are followed: the keys each reads, and what it makes of them and of the rest of config.json.
SCALINGS = {
    "default": (set(), lambda given, config: RopeScaling()),
    "linear": ({"factor"}, lambda given, config: LinearRope(given.number("factor"))),
    "dynamic": ({"factor"}, _dynamic),
    "yarn": (
        {"factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
        _yarn,
    ),
    "llama3": ({"factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"}, _llama3),
}
