"""Run in a process of its own with 8 virtual CPU devices: the vectors of a tiny embedder, on all of them and on one.

python -m tests.devices_worker OUT.npz FOLDER     FOLDER: the embedder's
"""

import sys

import jax
import numpy as np

from ragjax import embedding, load_embedder

TEXTS = [f"{place} " + "the river runs past the town " * (place * 7 % 5) for place in range(53)]


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
    np.savez(out, **results)


def _shares(devices: int) -> tuple[np.ndarray, np.ndarray]:
    return np.ones((devices, 1, 16), np.int32), np.full((devices, 1), 16, np.int32)


if __name__ == "__main__":
    main(*sys.argv[1:])
