"""The draw of the passages that go backward: how likely each is, and that the expected gradient is the exact one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax import losses
from ragjax.training.draws import answer_shares, draw_passages, inclusion_probabilities, systematic_sample
from ragjax.training.objectives import with_gradient_of

NLL = {"rag_token": losses.rag_token_nll, "rag_sequence": losses.rag_sequence_nll}


@pytest.mark.parametrize(
    ("shares", "count", "expected"),
    [
        ([0.5, 0.3, 0.2], 1, [0.5, 0.3, 0.2]),
        ([0.3, 0.5, 0.2], 2, [0.6, 1, 0.4]),
        # The first one is certain; what is left of the two places is shared out by 0.1, 0.06 and 0.04.
        ([0.8, 0.1, 0.06, 0.04], 2, [1, 0.5, 0.3, 0.2]),
        # The second one becomes certain by the first's being so.
        ([0.9, 0.08, 0.01, 0.01], 3, [1, 1, 0.5, 0.5]),
        ([0.97, 0.02, 0.01], 3, [1, 1, 1]),
        ([0.25] * 4, 2, [0.5] * 4),
        ([1.0, 0.0, 0.0], 2, [1, 0.5, 0.5]),  # a share that has underflowed can be drawn, so that there are two
    ],
)
def test_inclusion_probabilities_by_hand(shares, count, expected):
    np.testing.assert_allclose(inclusion_probabilities(np.array(shares), count), expected, rtol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_each_passage_is_drawn_as_often_as_its_probability_says(count):
    """Over 20,000 equally spaced random numbers; the c of min(1, c q) by bisection."""
    shares = np.random.default_rng(1).dirichlet([0.3] * 6)
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * shares).sum() < count else (low, middle)
    probabilities = inclusion_probabilities(shares, count)
    np.testing.assert_allclose(probabilities, np.minimum(1, low * shares), rtol=1e-6)
    starts = (np.arange(20_000) + 0.5) / 20_000
    drawn = np.stack([systematic_sample(probabilities, start) for start in starts])
    assert drawn.shape == (20_000, count) and (np.diff(drawn, axis=1) > 0).all()  # so many, none twice
    np.testing.assert_allclose(np.bincount(drawn.ravel(), minlength=6) / 20_000, probabilities, atol=1e-4)


@pytest.mark.parametrize("objective", NLL)
def test_shares_are_the_gradients_of_the_loss(objective):
    """Minus the derivative by each token's log-prob, its mean over the tokens; padding has no part in it."""
    rng = np.random.default_rng(2)
    docs, scores = rng.standard_normal(4), -rng.exponential(2.0, (4, 3))
    padded, mask = np.pad(scores, ((0, 0), (0, 2)), constant_values=-7.0)[None], np.arange(5)[None] < 3
    log_probs = jax.nn.log_softmax(docs)[None]
    gradient = jax.grad(lambda answers: NLL[objective](log_probs, answers, mask).sum())(jnp.asarray(padded))
    expected = -np.asarray(gradient)[0].sum(axis=1) / 3
    np.testing.assert_allclose(answer_shares(objective, docs, scores), expected, rtol=1e-5)
    np.testing.assert_allclose(answer_shares(objective, docs + 40.0, scores), expected, rtol=1e-5)


def test_numbers_that_have_gone_wrong_are_drawn_alike():
    """The step that they lead to is refused; the draw is not where it ends."""
    for wrong in (np.nan, -np.inf):
        scores = np.array([[-1.0, wrong], [-2.0, -1.0]])
        assert answer_shares("rag_token", np.zeros(2), scores).tolist() == [0.5, 0.5]


def test_a_draw_follows_from_its_seed_alone():
    shares = np.full(5, 0.2)
    draws = [draw_passages(shares, 2, (0, step, 7)).passages.tolist() for step in range(20)]
    assert draws == [draw_passages(shares, 2, (0, step, 7)).passages.tolist() for step in range(20)]
    assert len(set(map(tuple, draws))) > 1
    other_questions = [draw_passages(shares, 2, (0, 3, index)).passages.tolist() for index in range(20)]
    assert len(set(map(tuple, other_questions))) > 1


# --- the gradient

B, K, T, WIDTH, VOCABULARY = 2, 5, 3, 2, 3
MASK = np.array([[True, True, True], [True, False, False]])


class Toy:
    """A generator of six weights, answers of three tokens and of one under passages with numbers of their own."""

    def __init__(self, objective: str):
        rng = np.random.default_rng(4)
        self.objective = objective
        self.states = rng.standard_normal((B, K, T, WIDTH)).astype(np.float32)
        self.targets = rng.integers(VOCABULARY, size=(B, T))
        self.docs = np.asarray(jax.nn.log_softmax(rng.standard_normal((B, K)).astype(np.float32)))
        self.weights = rng.standard_normal((WIDTH, VOCABULARY)).astype(np.float32)
        self.scores = np.asarray(self.log_probs(self.weights))
        self.shares = [
            answer_shares(objective, docs, scores[:, mask])
            for docs, scores, mask in zip(self.docs, self.scores, MASK, strict=True)
        ]

    def log_probs(self, weights):
        """[B, K, T]"""
        targets = jnp.broadcast_to(self.targets[:, None], (B, K, T))
        return jnp.take_along_axis(jax.nn.log_softmax(self.states @ weights), targets[..., None], axis=-1)[..., 0]

    def exact(self):
        """(loss, its gradient) of all passages."""
        return jax.value_and_grad(lambda weights: self.loss(self.log_probs(weights)))(self.weights)

    def loss(self, answer_log_probs):
        return NLL[self.objective](self.docs, answer_log_probs, MASK).sum()

    def drawn(self, places, factors):
        """Losses [n] and gradients [n, WIDTH, VOCABULARY] of n draws [n, B, m]."""

        def loss(weights, places, factors):
            own = jnp.take_along_axis(self.log_probs(weights), places[:, :, None], axis=1)
            return self.loss(with_gradient_of(self.scores, own, places, factors))

        found = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, 0)))
        return found(self.weights, jnp.asarray(places), jnp.asarray(factors, jnp.float32))


@pytest.mark.parametrize("objective", NLL)
def test_the_mean_of_2000_draws_is_the_exact_gradient(objective):
    """Within three standard errors in each weight, at seeds as training takes them; each draw has the exact loss."""
    toy = Toy(objective)
    draws = [[draw_passages(shares, 2, (0, n, b)) for b, shares in enumerate(toy.shares)] for n in range(2000)]
    places = np.stack([[draw.passages for draw in one] for one in draws])
    factors = np.stack([[draw.weights for draw in one] for one in draws])
    values, gradients = toy.drawn(places, factors)
    loss, expected = toy.exact()
    np.testing.assert_allclose(values, loss, rtol=1e-6)
    standard_error = np.std(gradients, axis=0, ddof=1) / np.sqrt(2000)
    assert (standard_error > 1e-4).all()  # the draws do differ
    assert (np.abs(np.mean(gradients, axis=0) - expected) <= 3 * standard_error).all()


@pytest.mark.parametrize("objective", NLL)
@pytest.mark.parametrize("count", [1, 3, K])
def test_the_expected_gradient_is_the_exact_one(objective, count):
    """Summed over everything that can be drawn: a draw changes only where the random number passes an end.

    With all passages drawn there is one outcome, the exact gradient.
    """
    toy, expected = Toy(objective), 0.0
    for b, shares in enumerate(toy.shares):
        probabilities = inclusion_probabilities(shares, count)
        ends = np.unique([0.0, *(np.cumsum(probabilities) % 1), 1.0])
        chosen = np.stack([systematic_sample(probabilities, middle) for middle in (ends[1:] + ends[:-1]) / 2])
        places, factors = np.zeros((len(chosen), B, count), np.int32), np.zeros((len(chosen), B, count))
        places[:, b], factors[:, b] = chosen, 1 / probabilities[chosen]  # the other question: nothing goes backward
        expected = expected + np.tensordot(np.diff(ends), toy.drawn(places, factors)[1], axes=1)
        if count == K:
            np.testing.assert_allclose(factors[:, b], 1, rtol=1e-12)
    np.testing.assert_allclose(expected, toy.exact()[1], rtol=1e-5, atol=1e-6)
