"""A tiny data set and whole runs over it, on the random models of tests/tiny.py: seconds each, no network."""

import contextlib
import dataclasses
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from ragjax.config import RunConfig
from ragjax.data.dataset import Dataset
from ragjax.data.questions import Question
from ragjax.errors import UserError
from ragjax.fields import flag_text
from ragjax.pipeline import Pipeline
from ragjax.runs import Run, RunFolder
from ragjax.training import run as run_module
from ragjax.training import train
from ragjax.training.sampling import QuestionBatch
from ragjax.training.signals import Assembler
from tests.tiny import write_tiny_bert, write_tiny_llama

PLACES = [
    start + end for start in ("Ar", "Bex", "Cor", "Dun", "El", "Far") for end in ("by", "holm", "ley", "more", "ton")
]
SPLITS = {"train": 12, "dev": 4, "test": 6}


@dataclasses.dataclass(frozen=True)
class World:
    """Folders of two tiny models and a tiny data set, and runs over them."""

    folder: Path
    embedder: Path
    generator: Path
    data: Path

    def config(self, run_dir: str | os.PathLike, **changes: Any) -> RunConfig:
        """A short joint run: 4 steps of 2 questions with 3 passages each."""
        values = {
            "strategy": "joint",
            "embedder": str(self.embedder),
            "generator": str(self.generator),
            "data": str(self.data),
            "run_dir": str(run_dir),
            "top_k": 3,
            "batch_size": 2,
            "max_steps": 4,
            "embedder_lr": 1e-3,
            "generator_lr": 1e-2,
            "lora_rank": 4,
            "hard_negatives": 0,
            "negative_filter": "labels",
            "negative_margin": 0.0,
            "max_new_tokens": 4,
            "eval_batch_size": 2,
            "dev_every": 2,
            "keep": "last",
            "dev_limit": 3,
            "checkpoint_every": 2,
        }
        return RunConfig(**values | changes)

    def environment(self) -> dict[str, str]:
        """Of a command's process: caches of its own, compiled code shared between the processes."""
        return os.environ | {
            "RAGJAX_CACHE": str(self.folder / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def command(self, *arguments: str, timeout: float = 900, **options: Any) -> subprocess.CompletedProcess:
        """Runs `python ARGUMENTS` in the world's folder."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            **options,
        )


@contextlib.contextmanager
def tiny_world(factory: pytest.TempPathFactory) -> Iterator[World]:
    """The world of this test session; inside, caches are its own, and programs that are compiled again come from one.

    Every `run` builds its training step anew: without XLA's cache most of these tests' time went into compiling.
    The folder is that of all test files of a process, so each names its runs in its own way.
    """
    folder = factory.getbasetemp() / "world"
    if not folder.exists():
        write_tiny_bert(folder / "bert")
        write_tiny_llama(folder / "llama")
        write_data(folder / "data", passages(), questions())
    options = {"jax_compilation_cache_dir": str(folder / "xla"), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAGJAX_CACHE", str(folder / "cache"))
        # A page takes a second to draw, and there are hundreds of runs; tests/reporting has what draws them.
        patch.setattr(run_module, "write_run_report", _write_empty_page)
        _configure(options)
        try:
            yield World(folder, folder / "bert", folder / "llama", folder / "data")
        finally:
            _configure(before)


def _write_empty_page(files: RunFolder) -> Path:
    files.report_file.write_text("", encoding="utf-8")
    return files.report_file


def _configure(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it reads its folder once


def run_of(config: RunConfig, pipeline: Pipeline, dataset: Dataset) -> Run:
    """A run in the configuration's folder, put together by hand."""
    return Run(config, RunFolder(Path(config.run_dir)), dataset, pipeline)


def batch_of(
    assembler: Assembler, questions: Sequence[Question], step: int = 0, training: bool = True
) -> QuestionBatch:
    """These of an assembler's questions, by their places in its split."""
    sampler = assembler.sampler
    split = sampler.train if training else sampler.dev
    places = [next(i for i, other in enumerate(split) if other is question) for question in questions]
    return QuestionBatch(questions, sampler.tokenize([q.question for q in questions]), places, step, training)


def run_flags(config: RunConfig) -> list[str]:
    """The configuration as flags of ragjax.train; what is None has no flag that says so."""
    return [f"--{name}={flag_text(value)}" for name, value in dataclasses.asdict(config).items() if value is not None]


def passages() -> list[dict[str, str]]:
    """30 passages of different lengths, each about a place of its own."""
    return [
        {
            "id": f"p{i}",
            "title": place,
            "text": f"{place} is the town number {i} of the north." + " It is old." * (i % 4),
        }
        for i, place in enumerate(PLACES)
    ]


def questions() -> dict[str, list[dict[str, Any]]]:
    """Questions of each split about places of its own; the questions differ in length."""
    numbers = iter(range(len(PLACES)))
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, count in SPLITS.items():
        splits[split] = [_question(split, next(numbers)) for _ in range(count)]
    return splits


def _question(split: str, i: int) -> dict[str, Any]:
    text = f"Which number has the town {PLACES[i]}" + ", the old one" * (i % 3) + "?"
    return {"id": f"{split}-{i}", "question": text, "answers": [f"{i}", f"number {i}"], "positive_ids": [f"p{i}"]}


def write_data(folder: Path, corpus: Iterable[Mapping], splits: Mapping[str, Iterable[Mapping]]) -> Path:
    """A data folder; the corpus is gzipped, the splits are plain."""
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "corpus.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in corpus)
    for split, records in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def changed(before: Any, after: Any) -> set[str]:
    """Names of the leaves that differ in any bit."""
    before, after = flat(before), flat(after)
    assert before.keys() == after.keys()
    return {name for name in before if not np.array_equal(before[name], after[name])}


def refusal(config: RunConfig) -> str:
    """The sentence that the run ends with."""
    with pytest.raises(UserError) as caught:
        train(config)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message.replace(config.run_dir, "")) < 500
    return message


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Nested dicts of arrays as {"a/b/c": array}."""
    if not isinstance(tree, Mapping):
        return {"": np.asarray(tree)}
    return {
        "/".join(filter(None, (name, rest))): leaf for name, part in tree.items() for rest, leaf in flat(part).items()
    }
