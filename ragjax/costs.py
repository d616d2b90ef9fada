"""What a run costs: seconds, FLOPs and tokens by part.

FLOPs are the model's, by formula, over real tokens: padding and what rematerialisation computes again are not
counted. With N weights in matrix products a token takes

    forward                     2N
    training with LoRA          4N   (forward, and the gradient of the activations)
    training all weights        6N   (and the gradient of the weights)

to which come attention's scores and mixing, 4 * s^2 * (heads * head width) a layer and sequence of s tokens
forward and twice that backward, and the vocabulary head, which is computed at answer positions only.
"""

import dataclasses
import resource
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

TRAINING_PARTS = ("embedder", "generator", "search", "encode")
PARTS = (*TRAINING_PARTS, "evaluation")


@dataclasses.dataclass(frozen=True)
class Cost:
    """seconds of wall-clock, floating-point operations, tokens read or written, and how many of those tokens went
    backward too.
    """

    seconds: float = 0.0
    flops: float = 0.0
    tokens: int = 0
    backward_tokens: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(one + another for one, another in pairs))


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """What the formulas need to know of a transformer."""

    layer_weights: int  # weights of all layers' matrix products, adapters excluded
    head_weights: int  # D * V, 0 for an embedder
    lora_weights: int  # 0 without adapters
    layers: int
    attention_width: int  # query heads * head width


def forward_flops(size: ModelSize, lengths: Iterable[float], head_positions: int) -> float:
    """One forward pass over sequences of these lengths, with the head at `head_positions` places."""
    linear, attention, head = _forward_parts(size, lengths, head_positions)
    return linear + attention + head


def encoding_flops(size: ModelSize, texts: int, tokens: int) -> float:
    """Of so many texts with so many tokens together, each taken at the mean length (attention is a few percent)."""
    return texts * forward_flops(size, [tokens / texts], 0)


def train_flops(size: ModelSize, lengths: Iterable[float], head_positions: int) -> float:
    """Forward and backward: 4N a token for frozen weights under adapters (6N for the adapters), 6N without them."""
    lengths = list(lengths)
    linear, attention, head = _forward_parts(size, lengths, head_positions)
    if not size.lora_weights:
        return 3 * (linear + attention + head)
    adapters = 2.0 * size.lora_weights * sum(lengths)
    return 2 * (linear - adapters + head) + 3 * (adapters + attention)


def decode_flops(size: ModelSize, prompt_lengths: Iterable[int], tokens_read: Iterable[int]) -> float:
    """Prefill of prompts, and `tokens_read` after each in cached steps: all of an answer, to see whether it ends."""
    total = 0.0
    for prompt, steps in zip(prompt_lengths, tokens_read, strict=True):
        total += forward_flops(size, [prompt], head_positions=1)
        linear = 2.0 * (size.layer_weights + size.lora_weights + size.head_weights) * steps
        attended = steps * prompt + steps * (steps + 1) / 2
        total += linear + 4.0 * size.layers * size.attention_width * attended
    return total


def _forward_parts(size: ModelSize, lengths: Iterable[float], head_positions: int) -> tuple[float, float, float]:
    lengths = list(lengths)
    linear = 2.0 * (size.layer_weights + size.lora_weights) * sum(lengths)
    attention = 4.0 * size.layers * size.attention_width * sum(length * length for length in lengths)
    return linear, attention, 2.0 * size.head_weights * head_positions


class Ledger:
    """Costs so far, by part. Saved with the run, so that a resumed run continues counting."""

    def __init__(self, parts: Mapping[str, Mapping[str, float]] | None = None):
        self._parts = {part: Cost(**(parts or {}).get(part, {})) for part in PARTS}

    def add(self, part: str, cost: Cost) -> None:
        self._parts[part] = self._parts[part] + cost

    def merge(self, other: "Ledger") -> None:
        for part, cost in other._parts.items():
            self.add(part, cost)

    def split(self, seconds: float, work: Mapping[str, Cost]) -> None:
        """Adds one compiled step that holds the work of several parts: its seconds go to them by their FLOPs."""
        total = sum(cost.flops for cost in work.values())
        for part, cost in work.items():
            self.add(part, dataclasses.replace(cost, seconds=seconds * cost.flops / total if total else 0.0))

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Each part as plain numbers: what the constructor takes."""
        return {part: dataclasses.asdict(cost) for part, cost in self._parts.items()}

    def part(self, name: str) -> Cost:
        return self._parts[name]

    def total(self) -> Cost:
        """Of the training parts; evaluation stands apart."""
        return sum((self._parts[part] for part in TRAINING_PARTS), Cost())

    def summary(self) -> dict:
        """The `cost` entry of summary.json: the training parts' sum at the top level, then every part."""
        return {**dataclasses.asdict(self.total()), **self.as_dict()}


def free_memory_bytes() -> int | None:
    """What this process could still take of the host's memory, as far as the system tells (None: it does not)."""
    try:
        free = _kib("/proc/meminfo", "MemAvailable")
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        return free if limit == resource.RLIM_INFINITY else min(free, limit - _kib("/proc/self/status", "VmSize"))
    except (OSError, StopIteration):  # no Linux
        return None


def _kib(path: str, name: str) -> int:
    """The bytes that a line "NAME: n kB" gives."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def peak_memory_bytes() -> int:
    """The process's peak resident memory (an accelerator's own memory is not in it)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
