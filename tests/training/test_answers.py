"""Steps that learn from answers: how one is cut that the compiled shapes do not hold."""

import jax
import numpy as np
import pytest

from ragjax.costs import Ledger
from ragjax.data.batches import Shape
from ragjax.parallel import Layout
from ragjax.runs import prepare
from ragjax.training.loop import split_trainable
from ragjax.training.signals import prompt_side
from ragjax.training.step import summed_loss
from ragjax.training.strategies import STRATEGIES
from tests.tiny_runs import tiny_world

pytestmark = pytest.mark.slow

(JOINT,) = STRATEGIES["joint"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


@pytest.fixture(scope="module")
def run(world):
    return prepare(world.config("unused", batch_size=5, loss_reduction="mean"))


def gradients(run, assembled):
    """Of the sum over all micro-batches, with the sums that the loss is divided by."""
    trainable, frozen = split_trainable(run, JOINT)
    objective = JOINT.signal.make_assembler(run, JOINT.trains).objective
    take = jax.jit(jax.grad(lambda *trees: summed_loss(objective, *trees, None), has_aux=True))
    batch = assembled.batch
    parts = [
        jax.tree.map(lambda leaf, g=g, m=m: leaf[g, m], batch) for g, m in np.ndindex(*batch.question_lengths.shape[:2])
    ]
    found = [take(trainable, frozen, part) for part in parts]
    return jax.device_get(jax.tree.map(lambda *leaves: sum(leaves), *found))


def test_a_step_that_is_cut_is_the_whole_step(run, monkeypatch):
    whole = JOINT.signal.make_assembler(run, JOINT.trains)
    asked = whole.sampler.training_batch(1)
    variables = run.variables
    one = whole.assemble(asked, variables, Ledger())
    length = one.batch.rows.tokens.shape[-1]
    monkeypatch.setattr(prompt_side, "choose_shapes", lambda *_: (Shape(6, length, 8),))
    finer = JOINT.signal.make_assembler(run, JOINT.trains)
    cut = finer.assemble(asked, variables, Ledger())
    assert one.batch.rows.tokens.shape[:2] == (1, 1)
    assert cut.batch.rows.tokens.shape == (1, 3, 6, length)  # three micro-batches of two questions, of three prompts
    assert cut.work == one.work and cut.figures == one.figures
    (expected, counts), (got, own_counts) = gradients(run, one), gradients(run, cut)
    assert own_counts["questions"] == counts["questions"] == 5
    assert own_counts["answer_tokens"] == counts["answer_tokens"]
    assert own_counts["loss"] == pytest.approx(counts["loss"], rel=1e-6)
    largest = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(expected))
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        # The gradient of the key's bias is rounding noise.
        norm = largest if "key/bias" in jax.tree_util.keystr(path, simple=True, separator="/") else np.linalg.norm(leaf)
        assert np.linalg.norm(other - leaf) <= 1e-5 * norm, path


@pytest.mark.parametrize(
    ("size", "prompts", "rows", "expected"),
    [
        (4, 5, 20, (1, 4)),  # every prompt has a row already: one shape of all answers' lengths
        (4, 5, 19, (2, 2)),
        (4, 5, 10, (2, 2)),
        (4, 5, 9, (4, 1)),
        (4, 5, 3, (4, 1)),  # a question's prompts stay together
        (5, 3, 9, (2, 3)),
        (1, 5, 2, (1, 1)),
    ],
)
def test_a_step_is_cut_as_little_as_the_largest_shape_allows(size, prompts, rows, expected):
    layout = Layout(groups=2, micro_batches=3, size=size)
    finer, (shape,) = prompt_side._cut(layout, prompts, Shape(rows, 64, 16))
    assert (finer.micro_batches, finer.size) == (3 * expected[0], expected[1])
    assert shape == Shape(expected[1] * prompts, 64, 16)
    assert finer.parts * finer.size >= layout.parts * size
    items = list(range(layout.parts * size))
    assert [item for part in finer.split(items) for item in part] == items


def test_the_first_step_has_the_largest_shape(run, monkeypatch):
    length = 192
    for rows, largest in ((6, 6), (2, 3)):  # the second is smaller than what one question's prompts need
        monkeypatch.setattr(
            prompt_side, "choose_shapes", lambda *_, rows=rows: (Shape(1, length, 8), Shape(rows, length, 8))
        )
        assembler = JOINT.signal.make_assembler(run, JOINT.trains)
        batch = assembler.sampler.training_batch(0)
        alone = batch._replace(questions=batch.questions[:1], tokens=batch.tokens[:1], indices=batch.indices[:1])
        first = assembler.assemble(alone, run.variables, Ledger())
        later = assembler.assemble(alone._replace(step=1), run.variables, Ledger())
        assert first.batch.rows.tokens.shape[2] == largest
        assert later.batch.rows.tokens.shape[2] <= largest
