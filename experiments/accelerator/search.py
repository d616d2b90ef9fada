"""How fast exact search is on the device: the five best of 1 and 10 million vectors for each of 256 questions.

    python experiments/accelerator/search.py [--small]

A matrix product and a top-k a block of vectors, then the best of the blocks' best. Questions are vectors of the corpus
with some noise, so each one's nearest vector is known. Bytes are those of the vectors, read once.
"""

import functools
from typing import Any

import common
import jax
import jax.numpy as jnp
import random_models as models
from common import Recorder

from ragjax.models.products import float32_matmul

QUESTIONS, WIDTH, TOP_K = 256, 768, 5
BLOCK = 1 << 16


def run(recorder: Recorder) -> None:
    width = 64 if recorder.small else WIDTH
    block = 1 << 10 if recorder.small else BLOCK
    for blocks in (2,) if recorder.small else (16, 160):
        for dtype in ("float32", "bfloat16"):
            find = functools.partial(measure, blocks, block, width, dtype)
            recorder.measure(f"search {blocks * block} x {width} {dtype}", find)


def measure(blocks: int, block: int, width: int, dtype: str) -> dict[str, Any]:
    vectors = random_vectors(blocks, block, width, dtype)
    rows = jnp.arange(QUESTIONS) * (blocks * block // QUESTIONS)
    chosen = vectors[rows // block, rows % block].astype(jnp.float32)
    noise = jax.random.normal(jax.random.key(1), chosen.shape) / width**0.5
    questions = (chosen + 0.3 * noise).astype(dtype)
    seconds = common.timed(lambda: nearest(questions, vectors), jax.block_until_ready)
    _, found = nearest(questions, vectors)
    missed = int(jnp.sum(found[:, 0] != rows))
    return {
        "seconds": seconds,
        "questions_per_second": QUESTIONS / seconds,
        "bytes": vectors.nbytes,
        "bytes_per_second": vectors.nbytes / seconds,
        "missed": missed,
        "ok": missed == 0,
        "peak_bytes_so_far": models.peak_bytes(),
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def random_vectors(blocks: int, block: int, width: int, dtype: str) -> jax.Array:
    """[blocks, block, width], unit length."""

    def draw(key: jax.Array) -> jax.Array:
        drawn = jax.random.normal(key, (block, width))
        return (drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)).astype(dtype)

    return jax.lax.map(draw, jax.random.split(jax.random.key(0), blocks))


@jax.jit
def nearest(questions: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(scores, rows) [Q, k] of the largest inner products of questions [Q, E] with vectors [blocks, block, E]."""

    def within(start: jax.Array, part: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        scores, places = jax.lax.top_k(float32_matmul(questions, part.T), TOP_K)
        return start + part.shape[0], (scores, places + start)

    _, (scores, rows) = jax.lax.scan(within, jnp.int32(0), vectors)
    scores, rows = (jnp.moveaxis(found, 0, 1).reshape(len(questions), -1) for found in (scores, rows))
    best, places = jax.lax.top_k(scores, TOP_K)
    return best, jnp.take_along_axis(rows, places, axis=1)


if __name__ == "__main__":
    common.main(run)
