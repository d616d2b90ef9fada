"""Answers of one generator, kept by prompt: pipelines that find the same passages share them."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ragjax.config import DecodeConfig
from ragjax.files import KeyedRecords
from ragjax.generation import Decoded, Prepared
from ragjax.parallel import Arrangement
from ragjax.pretrained import Generator


class CachedGenerations:
    """Stands in for what `Generator.prepared` gives."""

    def __init__(self, generator: Generator, arrangement: Arrangement, path: Path):
        """arrangement: of the devices that share questions out. path: the file that answers are kept in (.jsonl)."""
        self._generator, self._arrangement, self._records = generator, arrangement, KeyedRecords(path)

    @functools.cached_property
    def _source(self) -> Prepared:
        return self._generator.prepared(self._arrangement)

    def __len__(self) -> int:
        """Answers that were decoded so far."""
        return len(self._records)

    def decode_answers(
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        log_weights: np.ndarray,
        config: DecodeConfig,
        batch_size: int,
        seeds: Sequence[int],
    ) -> list[Decoded]:
        """The answer to each question; only prompts that are new are decoded."""
        settings = json.dumps({field.name: getattr(config, field.name) for field in dataclasses.fields(DecodeConfig)})
        keys = [
            self._key(settings, *question) for question in zip(prompts, np.asarray(log_weights), seeds, strict=True)
        ]
        missing = list({key: i for i, key in enumerate(keys) if key not in self._records}.values())
        if missing:
            answers = self._source.decode_answers(
                [prompts[i] for i in missing],
                np.asarray(log_weights)[missing],
                config,
                batch_size,
                [seeds[i] for i in missing],
            )
            self._records.add(
                {
                    keys[i]: [answer.log_prob, answer.tokens_read, *answer.tokens]
                    for i, answer in zip(missing, answers, strict=True)
                }
            )
        found = [self._records[key] for key in keys]
        return [Decoded(list(map(int, tokens)), log_prob, int(read)) for log_prob, read, *tokens in found]

    def _key(self, settings: str, prompts: Sequence[Sequence[int]], log_weights: np.ndarray, seed: int) -> str:
        digest = hashlib.sha256(f"{self._generator.key} {settings} {seed} {list(map(len, prompts))}".encode())
        for prompt in prompts:
            digest.update(np.asarray(prompt, np.int64).tobytes())
        digest.update(np.asarray(log_weights, np.float32).tobytes())
        return digest.hexdigest()[:32]
