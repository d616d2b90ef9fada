"""Which passages of a question the generator learns from, where it learns from a few: they are drawn by their shares.

The gradient of the marginal negative log-likelihood with respect to log p(y_t | x, z_k, y_<t) is minus the passage's
share r_kt in that token, so passages that do not explain the answer hardly move the generator. m of K are drawn with
probabilities pi_k = min(1, c q_k), where q_k is the mean of r_kt over the tokens and c makes them sum to m, and what a
drawn passage gives counts 1 / pi_k times: the expected gradient is that of all K.

Systematic sampling (Madow 1949) draws exactly m, none twice, from one random number, and a passage whose pi is 1
always. Independent draws would spend several on the same likely passage.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32

# A share that has underflowed, or nearly so: there are m passages to draw even where one takes all.
_LEAST_SHARE = 1e-12


class Draw(NamedTuple):
    """The passages of a question that go backward."""

    passages: Int32[np.ndarray, " m"]  # their places among the K, ascending
    weights: Float32[np.ndarray, " m"]  # 1 / pi: what each one's gradient is multiplied by


def draw_passages(shares: Float[np.ndarray, " K"], count: int, seed: tuple[int, ...]) -> Draw:
    """`count` passages of a question, drawn by their shares; the same seed draws the same."""
    probabilities = inclusion_probabilities(shares, count)
    chosen = systematic_sample(probabilities, np.random.default_rng(seed).random())
    return Draw(chosen.astype(np.int32), (1 / probabilities[chosen]).astype(np.float32))


def answer_shares(
    objective: str, doc_scores: Float[np.ndarray, " K"], answer_log_probs: Float[np.ndarray, "K T"]
) -> Float[np.ndarray, " K"]:
    """Each passage's share in a question's answer, the mean over its tokens; they sum to 1.

    Args:
      objective: rag_token, where every token has shares of its own, or rag_sequence, where all have the same.
      doc_scores: log p(z|x), or what differs from it by one number for all passages.
      answer_log_probs: log p(y_t | x, z, y_<t) of the answer's T tokens.

    Returns:
      Equal shares where the numbers are not finite: such a step is for the training loop to refuse.
    """
    scores = answer_log_probs.astype(np.float64)
    if objective == "rag_sequence":
        scores = scores.sum(axis=1, keepdims=True)
    joint = doc_scores.astype(np.float64)[:, None] + scores
    if not np.isfinite(joint).all():
        return np.full(len(joint), 1 / len(joint))
    shares = np.exp(joint - joint.max(axis=0))
    return (shares / shares.sum(axis=0)).mean(axis=1)


def inclusion_probabilities(shares: Float[np.ndarray, " K"], count: int) -> Float[np.ndarray, " K"]:
    """min(1, c * share) with the c by which they sum to `count`, which is at most K."""
    shares = np.maximum(shares, _LEAST_SHARE)
    ranked = np.sort(shares)[::-1]
    rest = np.cumsum(ranked[::-1])[::-1][:count]  # the sum of each share and those after it
    open_places = count - np.arange(count)  # where those before it are certain
    certain = np.argmax(open_places * ranked[:count] <= rest)
    return np.minimum(1.0, open_places[certain] / rest[certain] * shares)


def systematic_sample(probabilities: Float[np.ndarray, " K"], start: float) -> np.ndarray:
    """The items that start, start + 1, start + 2 and so on meet, laid end to end with their probabilities as lengths.

    start: uniform in [0, 1), so that each item is met with its probability.
    """
    ends = np.cumsum(probabilities)
    points = start + np.arange(round(ends[-1]))
    return np.searchsorted(ends[:-1], points, side="right")  # what is left over by rounding belongs to the last
