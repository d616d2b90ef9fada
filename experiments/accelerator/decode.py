"""How fast answers are decoded: LLaMA-3-8B's shape, greedy, from five concatenated passages.

    python experiments/accelerator/decode.py [--small]

Prefill and decoding are timed apart. A step of decoding reads all weights and the keys and values of every prompt:
achieved bytes/s of that, beside what the device moves when it copies an array (read and write counted).
"""

import functools
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import random_models as models
from common import Recorder

from ragjax.data.batches import pad_tokens, round_up
from ragjax.generation import Rule, beam_search, prepare

NEW_TOKENS = 24


def run(recorder: Recorder) -> None:
    bench = Bench(common.shape_of("llama3-8b", recorder.small), recorder.small)
    recorder.measure("copy", bench.copy)
    # 128 for a card that 256 is too much for.
    for batch_size in (1, 2) if recorder.small else (8, 64, 1, 256, 128):
        recorder.measure(f"decode bf16 B={batch_size}", functools.partial(bench.measure, batch_size))


class _Model:
    """What decoding needs to know of a generator. Random weights choose the end token with a chance of 1 in V."""

    def __init__(self, config: dict[str, Any]):
        self.module, self.variables = models.decoder(config, "bfloat16", remat="none")
        self.eos_token_id = config["vocab_size"] - 1
        self.end_ids = (self.eos_token_id,)


class Bench:
    """Decoding with one model, which is made when a case first needs it."""

    def __init__(self, config: dict[str, Any], small: bool):
        self._config, self._small = config, small
        self._copied: float | None = None

    @functools.cached_property
    def _model(self) -> Any:
        return prepare(_Model(self._config))

    def copy(self) -> dict[str, Any]:
        """Bytes read and written a second while bfloat16 numbers are copied, two gigabytes of them."""
        x = jnp.ones(1 << (20 if self._small else 30), jnp.bfloat16)
        copy = jax.jit(lambda x: x + 1)
        self._copied = 2 * x.nbytes / common.timed(lambda: copy(x), jax.block_until_ready, seconds=0.5)
        return {"bytes_per_second": self._copied}

    def measure(self, batch_size: int) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        chosen = [one["concatenated"] for one in common.first_questions(batch_size, self._small)]
        prompts = [rng.integers(3, self._config["vocab_size"], length) for length in chosen]
        tokens, lengths = map(jnp.asarray, pad_tokens(prompts, batch_size, round_up(max(chosen), 64)))
        model, rule = self._model, Rule(NEW_TOKENS, self._model.end_ids)
        weights, seeds = jnp.zeros((batch_size, 1)), jnp.zeros(batch_size, jnp.uint32)
        is_asked = jnp.ones(batch_size, bool)

        def prefill() -> Any:
            unstacked = model.steps[0].config.decoding_layout
            return beam_search.prefill(model.module, model.variables, tokens, lengths, unstacked)

        prefill_seconds = common.timed(prefill, jax.block_until_ready)
        last, slots = jax.block_until_ready(prefill())
        steps = []

        def decode() -> Any:
            state = beam_search.begin(*model.steps, last, weights, is_asked, seeds, rule)
            state = beam_search.advance(*model.steps, slots, weights, seeds, state, NEW_TOKENS + 1, rule)
            steps.append(int(state.step))
            return state

        seconds = common.timed(decode, jax.block_until_ready)
        is_finite = bool(jnp.isfinite(decode().ended_scores).all())
        # The first token comes from the prompt's own state.
        weights_read = {name: tree for name, tree in model.variables["params"].items() if name != "embed_tokens"}
        a_step = sum(leaf.nbytes for leaf in jax.tree.leaves((weights_read, slots.slots)))
        read = (steps[-1] - 1) * a_step
        return {
            "prompt_tokens": sum(chosen),
            "padded_prompt_tokens": int(tokens.size),
            "new_tokens": steps[-1],
            "prefill_seconds": prefill_seconds,
            "prefill_tokens_per_second": sum(chosen) / prefill_seconds,
            "decode_seconds": seconds,
            "tokens_per_second": batch_size * steps[-1] / seconds,
            "bytes_per_second": read / seconds,
            "share_of_copy": read / seconds / self._copied if self._copied else None,
            "ok": is_finite,
            "peak_bytes_so_far": models.peak_bytes(),
        }


if __name__ == "__main__":
    common.main(run)
