"""Greedy answers of one generator, kept by prompt: pipelines that find the same passages share them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ragjax.files import KeyedRecords
from ragjax.pretrained import Generator


class CachedGenerations:
    """Stands in for `Generator.generate_tokens`."""

    def __init__(self, generator: Generator, path: Path):
        """path: the file that answers are kept in (.jsonl)."""
        self._generator, self._records = generator, KeyedRecords(path)

    def __len__(self) -> int:
        """Answers that were generated so far."""
        return len(self._records)

    def generate_tokens(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
    ) -> list[list[int]]:
        """New tokens of each prompt, the end token left out; only prompts that are new are decoded."""
        keys = [self._key(prompt, max_new_tokens) for prompt in prompts]
        missing = list({key: i for i, key in enumerate(keys) if key not in self._records}.values())
        if missing:
            answers = self._generator.generate_tokens([prompts[i] for i in missing], max_new_tokens, batch_size)
            self._records.add({keys[i]: answer for i, answer in zip(missing, answers, strict=True)})
        return [list(self._records[key]) for key in keys]

    def _key(self, prompt: Sequence[int], max_new_tokens: int) -> str:
        digest = hashlib.sha256(f"{self._generator.key} {max_new_tokens}".encode())
        digest.update(np.asarray(prompt, np.int64).tobytes())
        return digest.hexdigest()[:32]
