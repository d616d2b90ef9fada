"""The mixture of passages with each retriever objective: values, and what moves the embedder and what the generator.

With an objective of its own the embedder learns from likelihoods held constant, and the generator from retrieval
probabilities held constant. Derivatives are taken numerically in float64, with just those parts held.
"""

import jax
import numpy as np
import pytest

from ragjax import losses
from ragjax.training.objectives import AnswerMixture, merge
from tests.test_losses import ENUMERATED
from tests.test_retriever_losses import enumerated

SCALE, TEMPERATURE = 2.0, 1.7
NLL = {"rag_token": losses.rag_token_nll, "rag_sequence": losses.rag_sequence_nll}
RETRIEVERS = {
    "emdr2": losses.emdr2_nll,
    "pdist": losses.perplexity_distillation_nll,
    "replug_lsr": losses.replug_lsr_nll,
}
CASES = [(name, retriever) for name in NLL for retriever in ("marginal", *RETRIEVERS)]


def random_inputs():
    """Two questions with answers of three tokens and one, and a filler full of numbers that must not count."""
    rng = np.random.default_rng(3)
    vectors, passages = rng.standard_normal((3, 4)), rng.standard_normal((3, 3, 4))
    answers = np.log(rng.uniform(0.05, 0.95, (3, 3, 3)))
    mask = np.array([[True, True, True], [True, False, False], [False, False, False]])
    return vectors, passages, answers, mask


def retrieval(vectors, passages):
    """log p(z|x) [B, K] in float64."""
    scores = SCALE * np.einsum("be,bke->bk", vectors, passages)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def parts(name, retriever, inputs, held):
    """(the generator's loss, the retriever's) of each question: where they stop a gradient, `held` takes its place."""
    vectors, passages, answers, mask = inputs
    docs, held_docs = retrieval(vectors, passages), retrieval(*held[:2])
    if retriever == "marginal":
        return ENUMERATED[NLL[name]](docs, answers, mask), np.zeros(len(mask))
    nll = ENUMERATED[NLL[name]](held_docs, answers, mask)
    return nll, enumerated(RETRIEVERS[retriever], docs, held[2], mask, TEMPERATURE)


def numerical_gradients(name, retriever, inputs):
    """Of the summed loss, by question vectors, passage vectors and answer log-probs: central differences."""
    gradients = []
    for place in range(3):
        gradient = np.zeros_like(inputs[place])
        for entry in np.ndindex(gradient.shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = [part.copy() for part in inputs]
                moved[place][entry] += step
                values.append(sum(part.sum() for part in parts(name, retriever, moved, inputs)))
            gradient[entry] = (values[0] - values[1]) / 2e-5
        gradients.append(gradient)
    return gradients


def evaluate(mixtures, inputs):
    """(Losses, gradients of the summed loss by vectors, passages and answers) of each mixture, compiled together."""
    *arrays, mask = inputs

    def everything(arrays):
        def summed(arrays, mixture):
            found = mixture(*arrays, mask)
            return found.loss.sum(), found

        return {key: jax.grad(summed, has_aux=True)(arrays, mixture) for key, mixture in mixtures.items()}

    found = jax.device_get(jax.jit(everything)([array.astype(np.float32) for array in arrays]))
    return {key: (losses, gradients) for key, (gradients, losses) in found.items()}


@pytest.fixture(scope="module")
def results():
    mixtures = {case: AnswerMixture(case[0], SCALE, case[1], TEMPERATURE) for case in CASES}
    tempered = {
        (retriever, temperature): AnswerMixture("rag_token", SCALE, retriever, temperature)
        for retriever in ("marginal", *RETRIEVERS)
        for temperature in (4.0, 0.5)
    }
    names = {str(key): mixture for key, mixture in {**mixtures, **tempered}.items()}  # jit sorts keys
    found = evaluate(names, random_inputs())
    return {key: found[str(key)] for key in (*mixtures, *tempered)}


@pytest.mark.parametrize(("name", "retriever"), CASES)
def test_values_equal_enumeration(results, name, retriever):
    real = [array[:2] for array in random_inputs()]
    found, _ = results[name, retriever]
    nll, retriever_loss = parts(name, retriever, real, real)
    np.testing.assert_allclose(found.loss[:2], nll + retriever_loss, rtol=1e-5)
    np.testing.assert_allclose(found.nll[:2], nll, rtol=1e-5)
    if retriever == "marginal":
        assert "retriever_loss" not in found.figures
    else:
        np.testing.assert_allclose(found.figures["retriever_loss"][:2], retriever_loss, rtol=1e-5)
        assert np.abs(retriever_loss).min() > 1e-3
    assert found.answer_tokens.tolist() == [3, 1, 0]


@pytest.mark.parametrize(("name", "retriever"), CASES)
def test_gradients_equal_differences_with_the_stopped_parts_held(results, name, retriever):
    real = [array[:2] for array in random_inputs()]
    _, gradients = results[name, retriever]
    for got, expected in zip(gradients, numerical_gradients(name, retriever, real), strict=True):
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(got[:2], expected, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(("name", "retriever"), CASES)
def test_fillers_have_no_loss_and_no_gradient(results, name, retriever):
    found, gradients = results[name, retriever]
    assert found.valid.tolist() == [True, True, False]
    assert (found.loss[2], found.nll[2], found.answer_tokens[2]) == (0.0, 0.0, 0)
    for gradient in gradients:
        assert np.isfinite(gradient).all() and not gradient[2].any()


@pytest.mark.parametrize("retriever", RETRIEVERS)
def test_the_retrievers_objective_does_not_reach_the_generator(results, retriever):
    """Answers move as they would under a frozen embedder; and question vectors whatever the generator's own loss is."""
    inputs = random_inputs()
    _, (by_vectors, by_passages, by_answers) = results["rag_token", retriever]
    _, (_, _, alone) = results["rag_token", "marginal"]
    np.testing.assert_allclose(by_answers, alone, rtol=1e-5, atol=1e-7)
    _, (other_vectors, other_passages, _) = results["rag_sequence", retriever]
    np.testing.assert_allclose(by_vectors, other_vectors, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(by_passages, other_passages, rtol=1e-5, atol=1e-7)
    assert inputs[3].any(axis=1).tolist() == [True, True, False]


def test_temperature_is_the_retrievers_alone(results):
    for retriever in ("marginal", *RETRIEVERS):
        warm, cold = results[retriever, 4.0][0], results[retriever, 0.5][0]
        np.testing.assert_array_equal(warm.nll, cold.nll)
        assert np.allclose(warm.loss, cold.loss) == (retriever == "marginal")


def test_entropies_by_hand():
    """Retrieval 1/2, 1/4, 1/4; the answer has 1/4, 1/2, 1/2 under them, so that each explains it as well."""
    vectors = np.array([[1.0, 0.0], [1.0, 0.0]])
    logs = np.log([[0.5, 0.25, 0.25], [1.0, 1.0, 1.0]])
    passages = np.stack([logs, np.full_like(logs, 9.0)], axis=-1)
    unknown = np.log(1e-9)  # behind the answer's end
    answers = np.log([[[0.5, 0.5], [0.5, 1.0], [1.0, 0.5]], [[0.5, 0.5], [0.25, 0.5], [0.25, 0.5]]])
    answers = np.concatenate([answers, np.full((2, 3, 1), unknown) * np.arange(3)[:, None]], axis=-1)
    mask = np.array([[True, True, False], [True, False, False]])
    inputs = (vectors, passages, answers, mask)
    figures = evaluate({"": AnswerMixture("rag_token", 1.0)}, inputs)[""][0].figures
    np.testing.assert_allclose(figures["retrieval_entropy"], [1.5 * np.log(2), np.log(3)], rtol=1e-5)
    np.testing.assert_allclose(figures["posterior_entropy"], [np.log(3), 1.5 * np.log(2)], rtol=1e-5)


def test_collections_of_a_model_are_put_together():
    one, two, three = {"w": 1}, {"w": 2}, {"w": 3}
    frozen = {"embedder": {"params": one}, "generator": {"params": two}}
    assert merge(frozen, {"generator": {"lora": three}}) == {
        "embedder": {"params": one},
        "generator": {"params": two, "lora": three},
    }
    assert merge({}, {"embedder": {"params": one}}) == {"embedder": {"params": one}}
    assert frozen == {"embedder": {"params": one}, "generator": {"params": two}}
