"""How fast answers are decoded: LLaMA-3-8B's shape, greedy, from five concatenated passages.

    python experiments/accelerator/decode.py [--small]

Prefill and decoding are timed apart. A step of decoding reads all weights and the keys and values of every prompt:
achieved bytes/s of that, beside what the device moves when it copies an array (read and write counted).
"""

from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import random_models as models
from common import Recorder

from ragjax.data.batches import pad_tokens, round_up
from ragjax.generation import Rule, prepare, search

NEW_TOKENS = 24


def run(recorder: Recorder) -> None:
    config = common.shape_of("llama3-8b", recorder.small)
    copied = copy_speed(1 << (20 if recorder.small else 30))
    recorder.record("copy", bytes_per_second=copied)
    bench = Bench(config, copied, recorder.small)
    for batch_size in (1, 2) if recorder.small else (1, 8, 64, 256):
        recorder.measure(f"decode bf16 B={batch_size}", lambda size=batch_size: bench.measure(size))


def copy_speed(count: int) -> float:
    """Bytes read and written a second while `count` bfloat16 numbers are copied."""
    x = jnp.ones(count, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / common.timed(lambda: copy(x), jax.block_until_ready, seconds=0.5)


class _Model:
    """What decoding needs to know of a generator. Random weights choose the end token with a chance of 1 in V."""

    def __init__(self, config: dict[str, Any]):
        self.module, self.variables = models.decoder(config, "bfloat16", remat="none")
        self.eos_token_id = config["vocab_size"] - 1
        self.end_ids = (self.eos_token_id,)


class Bench:
    def __init__(self, config: dict[str, Any], copied: float, small: bool):
        self._model = prepare(_Model(config))
        self._config, self._copied, self._small = config, copied, small
        kept = {name: tree for name, tree in self._model.variables["params"].items() if name != "embed_tokens"}
        self._weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(kept))

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
            return search.prefill(model.module, model.variables, tokens, lengths, unstacked)

        prefill_seconds = common.timed(prefill, jax.block_until_ready)
        last, slots = jax.block_until_ready(prefill())
        steps = []

        def decode() -> Any:
            state = search.begin(*model.steps, last, weights, is_asked, seeds, rule)
            state = search.run(*model.steps, slots, weights, seeds, state, NEW_TOKENS + 1, rule)
            steps.append(int(state.step))
            return state

        seconds = common.timed(decode, jax.block_until_ready)
        # The first token comes from the prompt's own state.
        read = (steps[-1] - 1) * (self._weight_bytes + sum(leaf.nbytes for leaf in jax.tree.leaves(slots.slots)))
        return {
            "prompt_tokens": sum(chosen),
            "padded_prompt_tokens": int(tokens.size),
            "new_tokens": steps[-1],
            "prefill_seconds": prefill_seconds,
            "prefill_tokens_per_second": sum(chosen) / prefill_seconds,
            "decode_seconds": seconds,
            "tokens_per_second": batch_size * steps[-1] / seconds,
            "bytes_per_second": read / seconds,
            "share_of_copy": read / seconds / self._copied,
            "peak_bytes_so_far": models.peak_bytes(),
        }


if __name__ == "__main__":
    common.main(run)
