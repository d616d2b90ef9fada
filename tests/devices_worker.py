"""Run in a process of its own with 8 virtual CPU devices: the vectors of a tiny embedder and the answers of a tiny
generator, on all of them and on one.

python -m tests.devices_worker OUT.npz FOLDER     FOLDER: the embedder's
"""

import sys
from types import SimpleNamespace

import jax
import numpy as np

from ragjax import embedding, load_embedder
from ragjax.config import DecodeConfig
from ragjax.generation import Decoded, engines, prepare
from ragjax.parallel import REPLICATED
from tests.tiny_modules import tiny_decoder

TEXTS = [f"{place} " + "the river runs past the town " * (place * 7 % 5) for place in range(53)]

QUESTIONS, PASSAGES, NEW = 19, 3, 4
DECODED = {
    "concat": DecodeConfig(decode="concat", max_new_tokens=NEW),
    "sampled": DecodeConfig(decode="concat", max_new_tokens=NEW, temperature=0.9),
    "rag_token": DecodeConfig(decode="rag_token", max_new_tokens=NEW, num_beams=2),
    "rag_sequence": DecodeConfig(decode="rag_sequence", max_new_tokens=NEW, num_beams=2),
}


def answers() -> dict[str, np.ndarray]:
    """On all devices, two questions on each at once, and on one."""
    module, variables = tiny_decoder(seed=70, vocab_size=12)
    head = {"lm_head": jax.tree.map(lambda leaf: 4.0 * leaf, variables["params"]["lm_head"])}
    variables = {"params": variables["params"] | head}
    model = SimpleNamespace(module=module, variables=variables, eos_token_id=0, end_ids=(0,))
    shared = prepare(model, REPLICATED)
    rng, results = np.random.default_rng(4), {}
    prompts = [[rng.integers(1, 12, rng.integers(2, 9)).tolist() for _ in range(PASSAGES)] for _ in range(QUESTIONS)]
    log_weights = np.log(rng.dirichlet(np.ones(PASSAGES), QUESTIONS)).astype(np.float32)
    for name, config in DECODED.items():
        many = 1 if config.decode == "concat" else PASSAGES
        asked = [each[:many] for each in prompts], log_weights[:, :many] * (many > 1), config
        results |= packed(f"{name} one", prepare(model).decode_answers(*asked, 4))
        results |= packed(f"{name} eight", shared.decode_answers(*asked, 2))
    read = shared.engine.read(np.ones((16, 4), np.int32), np.full(16, 4, np.int32))
    results["devices that read"] = np.array(len({shard.device for shard in read[0].addressable_shards}))
    results["copies"] = np.array([shared.engine.copies, isinstance(prepare(model).engine, engines.OneCopy)])
    return results


def packed(name: str, decoded: list[Decoded]) -> dict[str, np.ndarray]:
    tokens = np.full((len(decoded), NEW), -1)
    for row, answer in zip(tokens, decoded, strict=True):
        row[: len(answer.tokens)] = answer.tokens
    numbers = [(answer.log_prob, answer.tokens_read) for answer in decoded]
    return {f"{name} tokens": tokens, f"{name} numbers": np.array(numbers)}


def main(out: str, folder: str) -> None:
    assert jax.local_device_count() == 8
    embedder = load_embedder(folder)
    results = {f"eight {size}": embedder.encode(TEXTS, batch_size=size) for size in (3, 64)}
    results["eight, few"] = embedder.encode(TEXTS[:2])
    used: set = set()
    groups = embedding._embed_groups(embedder.module)(embedder._placed, _shares(8))
    used.update(shard.device for shard in groups.addressable_shards)
    results["devices"] = np.array(len(used))
    embedding.device_count = lambda: 1
    results["one"] = embedding.embed_all(
        embedder.module,
        embedder.variables,
        embedder._tokens(TEXTS, ""),
        width=embedder.width,
        longest=embedder.max_seq_length,
        batch_size=64,
        advance=lambda _: None,
    )
    np.savez(out, **results, **answers())


def _shares(devices: int) -> tuple[np.ndarray, np.ndarray]:
    return np.ones((devices, 1, 16), np.int32), np.full((devices, 1), 16, np.int32)


if __name__ == "__main__":
    main(*sys.argv[1:])
