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
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int

from ragjax.arrays import AnyArray, Array
from ragjax.errors import UserError

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


def read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling]:
    """theta and the scaling that a config.json of either spelling asks for.

    Raises:
      UserError: naming a kind, a key or a value that is not followed, or a key that is missing.
    """
    old, new = _mapping(config, "rope_scaling"), _mapping(config, "rope_parameters")
    if old and new and old != new:
        raise UserError("config.json has a rope_scaling that differs from its rope_parameters: remove one of them.")
    field = "rope_scaling" if old else "rope_parameters"
    given = {name: value for name, value in (old or new).items() if value is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise UserError(
            f"config.json has the rope type {kind!r} in {field}, but this decoder supports only {_listed(SCALINGS)}."
        )
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UserError(f"config.json has partial_rotary_factor = {partial!r}, but this decoder supports only 1.")
    followed, make = SCALINGS[kind]
    if unknown := sorted(map(str, given.keys() - followed - _BESIDE)):
        raise UserError(
            f"config.json has {unknown[0]} = {given[unknown[0]]!r} in {field}, which is not followed for the rope type "
            f"{kind!r}: remove it if it changes nothing, or choose another model."
        )
    theta = _number(given if "rope_theta" in given else config, "rope_theta", field, 10000.0)
    if theta <= 1:
        raise UserError(f"config.json has rope_theta = {theta}, which is not above 1.")
    return theta, make(_Numbers(given, config, field))


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """The numbers of one scaling: `given`, inside `config` under `field`."""

    given: Mapping[str, Any]
    config: Mapping[str, Any]
    field: str

    def __call__(self, name: str, default: float | None = None) -> float:
        """A positive number. Raises UserError naming it where it is another thing, or lacks and has no default."""
        value = _number(self.given, name, self.field, default)
        if value <= 0:
            raise UserError(f"config.json has {name} = {value} in {self.field}, which is not a positive number.")
        return value

    @property
    def trained(self) -> int:
        return int(_number(self.config, "max_position_embeddings", "config.json"))

    @property
    def original(self) -> int:
        """The length before stretching: beside the scaling (transformers lets that win), inside it, or the model's."""
        if self.config.get("original_max_position_embeddings") is not None:
            return int(_number(self.config, "original_max_position_embeddings", "config.json"))
        return int(self("original_max_position_embeddings", self.trained))


def _mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"config.json has {name} = {value!r} where an object or null is needed.")
    return value


def _number(mapping: Mapping[str, Any], name: str, where: str, default: float | None = None) -> float:
    value = mapping.get(name)
    value = default if value is None else value
    if value is None:
        raise UserError(f"config.json lacks {name!r} in {where}, which its rope type needs.")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"config.json has {name} = {value!r} in {where} where a number is needed.")
    return float(value)


def _listed(names: Mapping[str, Any]) -> str:
    *first, last = map(repr, names)
    return f"{', '.join(first)} and {last}"


def _dynamic(numbers: _Numbers) -> DynamicRope:
    factor = numbers("factor")
    if factor < 1:  # a long text's theta would become negative
        raise UserError(f"config.json has factor = {factor} in {numbers.field}, but a dynamic one is at least 1.")
    return DynamicRope(factor, numbers.trained)


def _yarn(numbers: _Numbers) -> YarnRope:
    factor = numbers("factor", numbers.trained / numbers.original)
    if "attention_factor" in numbers.given:
        attention = numbers("attention_factor")
    elif numbers.given.get("mscale") and numbers.given.get("mscale_all_dim"):
        attention = _yarn_attention(factor, numbers("mscale")) / _yarn_attention(factor, numbers("mscale_all_dim"))
    else:
        attention = _yarn_attention(factor)
    return YarnRope(
        factor,
        numbers.original,
        attention,
        numbers("beta_fast", 32.0),
        numbers("beta_slow", 1.0),
        bool(numbers.given.get("truncate", True)),
    )


def _yarn_attention(factor: float, scale: float = 1.0) -> float:
    """The temperature that the YaRN paper found, section 3.4."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(numbers: _Numbers) -> Llama3Rope:
    low, high = numbers("low_freq_factor"), numbers("high_freq_factor")
    if low >= high:
        raise UserError(
            f"config.json has low_freq_factor = {low} in {numbers.field}, which is not below high_freq_factor = {high}."
        )
    return Llama3Rope(numbers("factor"), low, high, numbers.original)


_ORIGINAL = "original_max_position_embeddings"

# The rope types that are followed: the keys each reads, and what it makes of them.
SCALINGS = {
    "default": (set(), lambda numbers: RopeScaling()),
    "linear": ({"factor"}, lambda numbers: LinearRope(numbers("factor"))),
    "dynamic": ({"factor"}, _dynamic),
    "yarn": (
        {"factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
        _yarn,
    ),
    "llama3": ({"factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"}, _llama3),
}
