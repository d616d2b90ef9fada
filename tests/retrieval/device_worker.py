"""Run in a process of its own with 8 virtual CPU devices: what a DeviceIndex finds there, to a .npz file."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from ragjax.retrieval import ArrayVectors, device_index
from ragjax.retrieval.device_index import DeviceIndex, place_vectors, search_on_device
from ragjax.retrieval.retriever import Queries
from tests.retrieval.cases import unit

# passages, questions, k, dtype. 301 and 7 passages do not divide by 8, and 7 leave a device without any.
CASES = {
    "one question": (301, 1, 5, "float32"),
    "many questions": (301, 40, 5, "float32"),
    "all passages": (301, 3, 301, "float32"),
    "few passages": (7, 3, 4, "float32"),
    "equal passages": (301, 4, 47, "float32"),
    "bfloat16": (301, 40, 5, "bfloat16"),
    "int8": (301, 40, 5, "int8"),
}
STEP_CASES = ("many questions", "equal passages")
BLOCK = 16


def inputs(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of passages and questions."""
    count, questions, _, _ = CASES[case]
    rng = np.random.default_rng(3)
    vectors = unit(rng, count, 24)
    if case == "equal passages":  # every distinct vector stands about 30 times, at scattered rows
        vectors = vectors[:10][rng.permutation(np.arange(count) % 10)]
    return vectors, unit(rng, questions, 24)


def proposed(case: str) -> np.ndarray:
    """Passage rows."""
    vectors, asked = inputs(case)
    _, _, k, dtype = CASES[case]
    index = DeviceIndex(vectors, dtype)
    index._shards = place_vectors(ArrayVectors(vectors), dtype, BLOCK)  # of several blocks
    return index.search(Queries([""] * len(asked), asked), k).passage_rows


@jax.jit
def step(asked: jax.Array, shards: device_index.Shards) -> tuple[jax.Array, jax.Array]:
    """A compiled step that searches for what it has computed."""
    return search_on_device(asked * 2, shards, 3)


def in_a_step(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows."""
    vectors, asked = inputs(case)
    scores, rows = step(jnp.asarray(asked), place_vectors(ArrayVectors(vectors), "float32", BLOCK))
    return np.asarray(scores), np.asarray(rows)


if __name__ == "__main__":
    assert jax.local_device_count() == 8
    found = {case: proposed(case) for case in CASES}
    shards = place_vectors(ArrayVectors(inputs("many questions")[0]), "float32", BLOCK)
    places = {shard.device for shard in shards.vectors.addressable_shards}
    text = (
        jax.jit(search_on_device, static_argnames="k").lower(inputs("one question")[1], shards, k=3).compile().as_text()
    )
    found["devices"] = np.array([len(places)])
    found["share"] = np.array(shards.vectors.addressable_shards[0].data.shape)
    # Every device's own passages [n, E] or scores [B, n] would be gathered as an array with n numbers on an axis.
    found["gathers"] = np.array(
        [line for line in text.splitlines() if "all-gather(" in line and str(BLOCK) in line[:80]]
    )
    for case in STEP_CASES:
        found[f"scores of {case}"], found[f"rows of {case}"] = in_a_step(case)
    np.savez(sys.argv[1], **found)
