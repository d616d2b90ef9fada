"""Passages' vectors that follow the embedder while it is trained (--refresh_passages).

p(z|x) is made of the question's vector and the passage's. The question's is that of the moving embedder in every step;
the passages' are refreshed all together: where they would be older than --refresh_passages steps, and before each
measurement on the dev questions, so that what is measured is what would be kept. No gradient passes through them. They
stand in the checkpoints, because no later checkpoint has the weights that made them.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from ragjax.arrays import Tree, Variables
from ragjax.costs import Cost, Ledger, encoding_flops
from ragjax.errors import DivergedError
from ragjax.parallel import share_out
from ragjax.retrieval import MovingVectors
from ragjax.runs import Run
from ragjax.voice import counted, duration, say


class MovingPassages:
    """The vectors of a phase's passages, and the step whose embedder made them."""

    def __init__(self, run: Run):
        """Begins with the vectors that the run searches, those of step 0."""
        self._embedder, self._every = run.embedder, run.config.refresh_passages
        self._vectors = MovingVectors(run.pipeline.retriever.vectors)
        self._tokens = run.embedder.passage_tokens([passage.embedder_text for passage in run.dataset.passages])
        self.run = dataclasses.replace(run, pipeline=run.pipeline.over(self._vectors, run.config))
        self._step = 0
        each = duration(run.pipeline.encode_cost.seconds)
        say(
            f"{counted(len(self._tokens), 'passage')} are encoded anew at least every {counted(self._every, 'step')} "
            f"and for each measurement, in about {each} each time."
        )

    def keep_up(self, step: int, variables: Variables, ledger: Ledger) -> dict[str, float]:
        """Refreshes them where they would be too old for the next step; figures of metrics.jsonl."""
        moved = self.refresh(step, variables, ledger) if step - self._step >= self._every else {}
        return {"passages_age": step - self._step, **moved}

    def refresh(self, step: int, variables: Variables, ledger: Ledger) -> dict[str, float]:
        """Encodes them by the embedder of this step, unless that was done: {"passages_moved": the mean of 1 - cosine
        between a passage's last vector and its new one}.

        Raises:
          DivergedError: a vector is not finite.
        """
        if step == self._step:
            return {}
        began, embedder = time.perf_counter(), dataclasses.replace(self._embedder, **variables)
        tokens = self._tokens
        (vectors,) = share_out(lambda part: [embedder.encode_tokens(tokens[part], show_progress=True)], len(tokens))
        if not np.isfinite(vectors).all():
            raise DivergedError(
                f"a passage's vector is not finite after step {step}: the embedder has diverged, lower --embedder_lr"
            )
        moved = 1.0 - float(np.mean(_cosines(self._vectors.now, vectors)))
        self._vectors.replace(vectors)
        self._step, read = step, sum(map(len, tokens))
        flops = encoding_flops(embedder.size, len(vectors), read)
        ledger.add("encode", Cost(time.perf_counter() - began, flops, read))
        return {"passages_moved": moved}

    @property
    def tree(self) -> Tree:
        """Of a checkpoint."""
        return {"vectors": self._vectors.now}

    @property
    def extras(self) -> dict[str, Any]:
        """Of a checkpoint, besides."""
        return {"step": self._step}

    def restore(self, tree: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
        """Takes up what stood in a checkpoint."""
        self._vectors.replace(np.asarray(tree["vectors"]))
        self._step = extras["step"]


def _cosines(one: Float32[np.ndarray, "P E"], other: Float32[np.ndarray, "P E"]) -> Float32[np.ndarray, " P"]:
    return np.einsum("pe,pe->p", one, other) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))
