"""How fast a training step is: LLaMA-3-8B's shape under rank-16 adapters, five passages a question.

    python experiments/accelerator/step.py [--small]

The step is the one that `ragjax.train` compiles (training/step.py), with batches packed into the shapes that a run on
HotPotQA chooses. Tokens are real ones, padding left out. MFU counts 4N FLOPs a token where adapters are trained
(2N forward only) with N the weights of the layers' products; attention, the head and recomputation are left out.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import random_models as models
from common import Recorder

from ragjax.data.batches import ScoredBatch
from ragjax.parallel import ONE_DEVICE
from ragjax.training.objectives import AnswerMixture, AnswerObjective, LikelihoodObjective
from ragjax.training.state import init_state, make_optimizer
from ragjax.training.step import make_eval_step, make_train_step

Tree = Mapping[str, Any]

RATES = {"embedder": 1e-6, "generator": 2e-4}
SCALE = 20.0


def run(recorder: Recorder) -> None:
    small = recorder.small
    if not small:
        recorder.measure("product", large_product)
    embedder = models.encoder(common.shape_of("minilm", small))
    bf16 = Bench(recorder, embedder, "llama3-8b", "bf16")
    nf4 = Bench(recorder, embedder, "llama3-8b", "nf4")
    if small:  # fewer: the time goes into compiling
        bf16.train("rag_token", 1)
        bf16.forward(1)
        bf16.embedder_step(1)
        nf4.train("rag_token", 1)
        return
    bf16.train("rag_token", 4)
    nf4.train("rag_token", 4)
    bf16.train("rag_token", 8)
    bf16.train("rag_token", 1)
    bf16.embedder_step(4)
    bf16.forward(4)
    bf16.train("rag_sequence", 4)
    bf16.train("rag_token", 4, trains=("generator",))
    bf16.free()
    nf4.train("rag_token", 8)
    nf4.train("rag_token", 1)
    nf4.free()
    Bench(recorder, embedder, "mistral-7b", "bf16").train("rag_token", 4)


def large_product() -> dict[str, Any]:
    """What the device makes of one large bfloat16 product: the peak that a step could come near to."""
    width = 8192
    x, y = (jax.random.normal(jax.random.key(seed), (width, width), jnp.bfloat16) for seed in range(2))
    product = jax.jit(jnp.matmul)
    seconds = common.timed(lambda: product(x, y), jax.block_until_ready, seconds=0.5)
    kind = jax.devices()[0].device_kind
    return {"flops_per_second": 2 * width**3 / seconds, "mfu": common.utilisation(2 * width**3, seconds, kind)}


class Bench:
    """Steps over one pair of models. The generator is made when a case first needs it: there may be no room."""

    def __init__(self, recorder: Recorder, embedder: tuple[Any, Tree], generator: str, stored: str):
        self._recorder = recorder
        self._embedder, self._name = embedder, stored if generator == "llama3-8b" else f"{generator} {stored}"
        self._make = functools.partial(
            models.decoder,
            common.shape_of(generator, recorder.small),
            "bfloat16",
            None if stored == "bf16" else stored,
            lora=True,
        )
        self._made: tuple[Any, Tree] | None = None
        self._optimizer = make_optimizer(1.0, 0.01)

    @property
    def _generator(self) -> tuple[Any, Tree]:
        if self._made is None:
            self._made = self._make()
        return self._made

    def free(self) -> None:
        """Lets go of the generator's memory."""
        self._made = None

    def train(self, loss: str, questions: int, trains: tuple[str, ...] = ("embedder", "generator")) -> None:
        """A joint step, or one of the generator alone."""
        trained = "joint" if "embedder" in trains else "generator alone"

        def find() -> dict[str, Any]:
            objective = AnswerObjective(self._embedder[0], self._generator[0], AnswerMixture(loss, SCALE))
            batch, tokens, layout = self._batch(questions)
            trainable, frozen = self._split(trains)
            state = init_state(jax.tree.map(jnp.copy, trainable), RATES, self._optimizer)
            step = make_train_step(objective, self._optimizer, 1000, 0.1, "sum", seed=0)(ONE_DEVICE)
            figures = self._time_train(step, state, frozen, batch)
            return figures | layout | self._rates(tokens, 4, figures["seconds"])

        self._recorder.measure(f"{trained} {loss} {self._name} B={questions}", find)

    def forward(self, questions: int) -> None:
        """The same loss without gradients."""

        def find() -> dict[str, Any]:
            objective = AnswerObjective(self._embedder[0], self._generator[0], AnswerMixture("rag_token", SCALE))
            batch, tokens, layout = self._batch(questions)
            trainable, frozen = self._split(("embedder", "generator"))
            compiled, seconds = compile_for(make_eval_step(objective)(ONE_DEVICE), trainable, frozen, batch)
            median = common.timed(lambda: compiled(trainable, frozen, batch), jax.block_until_ready)
            return self._program(compiled, seconds, median) | layout | self._rates(tokens, 2, median)

        self._recorder.measure(f"forward only rag_token {self._name} B={questions}", find)

    def embedder_step(self, questions: int) -> None:
        """Two-phase's second phase: the generator's likelihoods are numbers in the batch."""
        objective = LikelihoodObjective(self._embedder[0], AnswerMixture("rag_token", SCALE))

        def find() -> dict[str, Any]:
            batch, _, _ = self._batch(questions)
            mask = batch.rows.answer_mask
            scores = np.full((*mask.shape[:2], common.PASSAGES, mask.shape[2]), -2.0, np.float32)
            scored = ScoredBatch(
                batch.question_tokens, batch.question_lengths, batch.passage_vectors, jnp.asarray(scores), mask
            )
            trainable, _ = self._split(("embedder",))
            state = init_state(jax.tree.map(jnp.copy, trainable), RATES, self._optimizer)
            step = make_train_step(objective, self._optimizer, 1000, 0.1, "sum", seed=0)(ONE_DEVICE)
            figures = self._time_train(step, state, {}, scored)
            return figures | {"questions_per_second": questions / figures["seconds"]}

        self._recorder.measure(f"phase 2 embedder B={questions}", find)

    def _batch(self, questions: int) -> tuple[Any, int, dict[str, Any]]:
        """(a batch [1 micro-batch, ...] on the device, its real tokens, how it is laid out)."""
        embedder, generator = self._embedder[0].config, self._generator[0].config
        chosen = common.first_questions(questions, self._recorder.small)
        made = models.examples(chosen, generator.vocab_size, embedder.vocab_size, embedder.hidden_size)
        batch, shape, tokens = models.batch_of(made, self._recorder.small)
        batch = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf)[None], batch))
        return batch, tokens, {"rows": shape.rows, "row_length": shape.row_length, "tokens": tokens}

    def _split(self, trains: tuple[str, ...]) -> tuple[dict[str, Tree], dict[str, Tree]]:
        """(trainable, frozen) of a strategy that trains these models, the generator by its adapters."""
        generator = dict(self._generator[1])
        trainable, frozen = {}, {"generator": generator}
        if "generator" in trains:
            trainable["generator"] = {"lora": generator.pop("lora")}
        (trainable if "embedder" in trains else frozen)["embedder"] = self._embedder[1]
        return trainable, frozen

    def _time_train(self, step: Callable, state: Any, frozen: Tree, batch: Any) -> dict[str, Any]:
        compiled, seconds = compile_for(step, state, frozen, batch, donate=True)
        holder = [state]

        def call() -> Any:
            holder[0], metrics = compiled(holder[0], frozen, batch)
            return metrics

        median = common.timed(call, jax.block_until_ready)
        loss = float(call()["loss"])
        return self._program(compiled, seconds, median) | {"loss": loss, "ok": bool(np.isfinite(loss))}

    def _program(self, compiled: Any, compile_seconds: float, median: float) -> dict[str, Any]:
        return {
            "seconds": median,
            "compile_seconds": compile_seconds,
            "planned_bytes": models.memory_of(compiled),
            "peak_bytes_so_far": models.peak_bytes(),
        }

    def _rates(self, tokens: int, passes: int, seconds: float) -> dict[str, Any]:
        """passes: FLOPs a token as a multiple of N."""
        flops = passes * models.model_size(*self._generator).layer_weights * tokens
        kind = jax.devices()[0].device_kind
        return {"tokens_per_second": tokens / seconds, "mfu": common.utilisation(flops, seconds, kind)}


def compile_for(function: Callable, *arguments: Any, donate: bool = False) -> tuple[Any, float]:
    """(the compiled program, seconds of tracing and compiling)."""
    began = time.perf_counter()
    compiled = jax.jit(function, donate_argnums=0 if donate else ()).lower(*arguments).compile()
    return compiled, time.perf_counter() - began


if __name__ == "__main__":
    common.main(run)
