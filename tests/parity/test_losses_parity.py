"""The losses against torch: sentence-transformers' own MNRL, and the RAG marginals written out with torch.

transformers' RagSequenceForGeneration is no reference here: its loss takes the first token apart and so is no
marginal likelihood of the answer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from ragjax import losses

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5


def unit_vectors(rng, *shape):
    vectors = rng.standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# ---- multiple negatives ranking ----------------------------------------------------------------------------


def sentence_transformers_mnrl(*columns, **options):
    """The loss of (questions, positives, further negatives...), each a tensor [B, E]."""
    loss = MultipleNegativesRankingLoss(torch.nn.Identity(), **options)  # the model is not asked
    return loss.compute_loss_from_embeddings(list(columns), torch.zeros(0))


@pytest.mark.parametrize("scale", [20.0, 1.0])
@pytest.mark.parametrize("negatives", [0, 2])
def test_mnrl_and_its_gradients_equal_sentence_transformers(scale, negatives):
    rng = np.random.default_rng(negatives)
    columns = [unit_vectors(rng, 6, 8) for _ in range(2 + negatives)]
    tensors = [torch.tensor(column, requires_grad=True) for column in columns]
    expected = sentence_transformers_mnrl(*tensors, scale=scale)
    expected.backward()

    def mean_loss(columns):
        # Theirs is a cosine; ours takes the vectors as they are, so their scaling to length one is written out here.
        questions, *passages = (column / jnp.linalg.norm(column, axis=1, keepdims=True) for column in columns)
        nll = losses.multiple_negatives_ranking_nll(questions, jnp.concatenate(passages), scale)
        assert nll.shape == (6,)
        return nll.mean()

    loss, gradients = jax.value_and_grad(mean_loss)(columns)
    np.testing.assert_allclose(loss, expected.item(), rtol=TOLERANCE)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=0, atol=TOLERANCE)


def test_mnrl_default_scale_is_sentence_transformers_default():
    rng = np.random.default_rng(3)
    questions, passages = unit_vectors(rng, 5, 8), unit_vectors(rng, 5, 8)
    expected = sentence_transformers_mnrl(torch.tensor(questions), torch.tensor(passages))
    loss = losses.multiple_negatives_ranking_nll(questions, passages).mean()
    np.testing.assert_allclose(loss, expected.item(), rtol=TOLERANCE)


def test_mnrl_labels_equal_torch_cross_entropy():
    rng = np.random.default_rng(4)
    questions, passages = unit_vectors(rng, 3, 8), unit_vectors(rng, 7, 8)
    labels = np.array([6, 0, 6])
    logits = 20.0 * torch.tensor(questions) @ torch.tensor(passages).T
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")
    nll = losses.multiple_negatives_ranking_nll(questions, passages, labels=labels)
    np.testing.assert_allclose(nll, expected.numpy(), rtol=TOLERANCE, atol=TOLERANCE)


# ---- RAG marginals -----------------------------------------------------------------------------------------


def torch_rag_token(docs, answers, lengths):
    """[B]: -sum_t log sum_z p(z|x) p(y_t|x, z, y_<t), answers cut to their lengths instead of masked."""
    return torch.stack(
        [-(docs[b, :, None] + answers[b, :, :n]).logsumexp(dim=0).sum() for b, n in enumerate(lengths)],
    )


def torch_rag_sequence(docs, answers, lengths):
    """[B]: -log sum_z p(z|x) prod_t p(y_t|x, z, y_<t)."""
    return torch.stack([-(docs[b] + answers[b, :, :n].sum(dim=1)).logsumexp(dim=0) for b, n in enumerate(lengths)])


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize(
    "ours, theirs", [(losses.rag_token_nll, torch_rag_token), (losses.rag_sequence_nll, torch_rag_sequence)]
)
def test_rag_losses_and_gradients_equal_torch(ours, theirs, scale):
    """From the vectors and the generator's logits on, with both gradients."""
    rng = np.random.default_rng(5)
    questions, passages = unit_vectors(rng, 4, 8), unit_vectors(rng, 4, 5, 8)
    logits = 3 * rng.standard_normal((4, 5, 6, 11)).astype(np.float32)
    targets = rng.integers(0, 11, (4, 6))
    lengths = [6, 1, 3, 2]
    mask = np.arange(6) < np.array(lengths)[:, None]

    def loss_of(questions, logits):
        docs = losses.doc_log_probs(questions, passages, scale)
        chosen = np.broadcast_to(targets[:, None, :, None], (4, 5, 6, 1))
        answers = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[..., 0]
        nll = ours(docs, answers, mask)
        return nll.sum(), nll

    (_, nll), gradients = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(questions, logits)

    their_questions, their_logits = (torch.tensor(x, requires_grad=True) for x in (questions, logits))
    docs = (scale * torch.einsum("be,bke->bk", their_questions, torch.tensor(passages))).log_softmax(dim=-1)
    chosen = torch.tensor(targets)[:, None, :, None].expand(4, 5, 6, 1)
    expected = theirs(docs, their_logits.log_softmax(dim=-1).gather(-1, chosen)[..., 0], lengths)
    expected.sum().backward()
    np.testing.assert_allclose(nll, expected.detach().numpy(), rtol=TOLERANCE)
    for gradient, tensor in zip(gradients, (their_questions, their_logits), strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=0, atol=TOLERANCE)


def test_doc_log_probs_equal_torch():
    rng = np.random.default_rng(6)
    questions, passages = 2 * unit_vectors(rng, 3, 8), unit_vectors(rng, 3, 5, 8)  # longer than one: not normalised
    scores = torch.tensor(passages) @ torch.tensor(questions)[:, :, None]
    expected = (7.0 * scores[..., 0]).log_softmax(dim=-1)
    np.testing.assert_allclose(losses.doc_log_probs(questions, passages, 7.0), expected.numpy(), rtol=0, atol=TOLERANCE)
