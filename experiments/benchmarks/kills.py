"""A short run that is killed twenty times ends like one that is left alone: the same bits, whatever the moments.

    python experiments/benchmarks/kills.py --out=experiments/results/kills.json

Real commands on the tests' tiny models: a seeded draw says which signal comes, SIGKILL or SIGTERM, and after which step
of the run; it comes some tenths of a second later, in a step, a measurement or a checkpoint. Kills of a command that
starts are left to the tests. It takes some minutes. After the last kill the same command comes to its end; parameters,
optimizer, metrics and predictions are then compared with the other run's.
"""

import argparse
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from provenance import provenance

from ragjax.checkpoints import Checkpoints, tree_sha256
from ragjax.config import RunConfig
from ragjax.fields import changed_flags
from ragjax.files import write_json
from ragjax.runs import RunFolder
from ragjax.training.state import make_optimizer

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tests.tiny import write_tiny_bert, write_tiny_llama
from tests.tiny_runs import passages, questions, write_data

STEPS = 40
DELAY_SECONDS = 0.3  # at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = written(Path(folder))
        killed, alone = (RunFolder(Path(folder) / name) for name in ("killed", "alone"))
        lives = list(kill(config, killed, flags.kills, random.Random(flags.seed)))
        for files in (killed, alone):
            end = command(config, files).wait()
            assert end == 0, f"{files.path} ended with {end}"
        different = differences(killed, alone)
        write_json(
            flags.out,
            {**provenance("orbax-checkpoint"), "steps": STEPS, "kills": lives, "different": different},
        )
    assert not different, different
    print(f"{len(lives)} kills, and not a bit is different")


def written(folder: Path) -> RunConfig:
    """The run's flags, over models and data that are written first."""
    write_tiny_bert(folder / "bert")
    write_tiny_llama(folder / "llama")
    write_data(folder / "data", passages(), questions())
    return RunConfig(
        embedder=str(folder / "bert"),
        generator=str(folder / "llama"),
        data=str(folder / "data"),
        top_k=3,
        batch_size=2,
        embedder_lr=1e-3,
        generator_lr=1e-2,
        lora_rank=4,
        lora_dropout=0.1,
        max_steps=STEPS,
        max_new_tokens=4,
        dev_every=7,
        dev_limit=3,
        checkpoint_every=3,
    )


def command(config: RunConfig, files: RunFolder) -> subprocess.Popen:
    cache = files.path.parent / "cache"
    own = {"RAGJAX_CACHE": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    flags = changed_flags(dataclasses.replace(config, run_dir=str(files.path)), RunConfig())
    return subprocess.Popen(
        [sys.executable, "-m", "ragjax.train", *flags],
        env=os.environ | own,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill(config: RunConfig, files: RunFolder, kills: int, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Starts the command and kills it, again and again: each kill's signal, moment and exit code."""
    for step in sorted(draw.randrange(STEPS) for _ in range(kills)):
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        began, process = time.time_ns(), command(config, files)
        while process.poll() is None and lines_since(files, began) <= step:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, DELAY_SECONDS))
        process.send_signal(number)
        life = {"signal": number.name, "step": step, "exit": process.wait()}
        print(life, flush=True)
        assert life["exit"] == (-number if number == signal.SIGKILL else 128 + number), life
        yield life


def lines_since(files: RunFolder, began: int) -> int:
    """Lines of metrics that stand there, once this command has taken them up."""
    if not files.metrics_file.exists() or files.metrics_file.stat().st_mtime_ns < began:
        return 0
    return files.metrics_file.read_bytes().count(b"\n")


def differences(one: RunFolder, other: RunFolder) -> list[str]:
    """What is not the same in both."""
    return [name for name, left, right in compared(one, other) if left != right]


def compared(one: RunFolder, other: RunFolder) -> Iterator[tuple[str, Any, Any]]:
    """(what, in one, in the other): files byte by byte, and of the last checkpoints their step and all arrays."""
    yield "metrics", *(files.metrics_file.read_bytes() for files in (one, other))
    for moment in ("before", "after"):
        yield f"predictions {moment}", *(files.measured("test", moment).read_bytes() for files in (one, other))
    yield "checkpoint", *(contents(Checkpoints(files.checkpoints("joint")), optimizer=True) for files in (one, other))
    yield "best state", *(contents(Checkpoints(files.best_checkpoints("joint"))) for files in (one, other))


def contents(checkpoints: Checkpoints, optimizer: bool = False) -> tuple[int, str]:
    """The step of the last checkpoint, and a hash of its arrays and their names."""
    step, trees, _ = checkpoints.restore({"trainable": None})
    if optimizer:
        states = {model: make_optimizer(1.0, 0.0).init(tree) for model, tree in trees["trainable"].items()}
        step, trees, _ = checkpoints.restore({**trees, "optimizer": states})
    return step, tree_sha256(trees)


if __name__ == "__main__":
    main()
