"""What the parts of the check share: flags, records, the clock, model shapes, random weights, HotPotQA's lengths.

A part is a script with `run(recorder)`; it is started by check.py, and runs by itself too. It imports no more than it
needs: a machine that has jax, flax, optax, numpy, transformers and what those bring is enough for ragjax's side, torch
and peft for the other side. faiss, gguf and tensorboardX may be missing.
"""

import argparse
import functools
import itertools
import json
import math
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # a bare machine has the checkout alone

LENGTHS = HERE / "lengths.json"

# config.json of the repositories that ragjax's short names stand for (docs/accelerators.md), the fields that shape a
# model. Both sides are built from them: ragjax's DecoderConfig.from_hf and transformers' LlamaConfig.
LLAMA3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
MISTRAL_7B = {
    **LLAMA3_8B,
    "model_type": "mistral",
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
MINILM = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
MPNET = {
    "model_type": "mpnet",
    "vocab_size": 30527,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 514,
    "layer_norm_eps": 1e-5,
}
MODELS = {"llama3-8b": LLAMA3_8B, "mistral-7b": MISTRAL_7B, "minilm": MINILM, "mpnet": MPNET}
TEXTS_AT_ONCE = 256
LONGEST_TEXT = {"minilm": 256, "mpnet": 384}  # tokens of a passage that the embedder reads, specials included
# --small: the same kinds of model, for a CPU.
_SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_SMALL_DECODER = {**_SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
_SMALL_ENCODER = {**_SMALL, "num_attention_heads": 4}

LORA_RANK = 16
PASSAGES = 5  # K, a question's
LORA_ALPHA = 32.0


def shape_of(model: str, small: bool) -> dict[str, Any]:
    """The config.json fields of a model, cut down where `small`."""
    full = MODELS[model]
    if not small:
        return full
    return full | (_SMALL_DECODER if "num_key_value_heads" in full else _SMALL_ENCODER)


# ---- one part's run


class Recorder:
    """Writes a line of JSON per finding as soon as it is found, and keeps the part's clock."""

    def __init__(self, path: Path | None, seconds: float, small: bool):
        """path: where records go, None for standard output; seconds: until the part should end."""
        self.small = small
        self._path = path
        self._end = time.monotonic() + seconds
        self._last = 0.0  # seconds of the last case: what the next may take

    def record(self, name: str, **figures: Any) -> None:
        """One finding. `ok` is False where something is wrong; `skipped` or `error` says why there is no figure.

        A figure that is not finite becomes null: JSON has no word for it.
        """
        finite = {key: value for key, value in figures.items() if not isinstance(value, float) or math.isfinite(value)}
        line = json.dumps({"name": name, **dict.fromkeys(figures), **finite})
        if self._path is None:
            print(line, flush=True)
        else:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(f"{line}\n")

    def measure(self, name: str, find: Callable[[], Mapping[str, Any]]) -> None:
        """Records what `find` returns, or why it could not: no time left, no memory, or what broke (which is wrong)."""
        self.measure_each(name, lambda: {"": find()})

    def measure_each(self, name: str, find: Callable[[], Mapping[str, Mapping[str, Any]]]) -> None:
        """The same for several findings at once, by what comes after `name`."""
        left = self._end - time.monotonic()
        if left < max(0.7 * self._last, 0.0):
            self.record(name, skipped=f"{left:.0f} s left")
            return
        began = time.monotonic()
        try:
            for part, figures in find().items():
                self.record(f"{name}{part}", **figures)
        except Exception as error:  # the cases after it are to be heard all the same
            if is_out_of_memory(error):
                self.record(name, error="out of memory", detail=str(error).splitlines()[0][:300])
            else:
                traceback.print_exc()
                self.record(name, ok=False, error=f"{type(error).__name__}: {str(error).strip()[:300]}")
        self._last = time.monotonic() - began


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device's memory did not do: jax's and torch's ways of saying so."""
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def main(run: Callable[[Recorder], None], *choices: str) -> None:
    """Runs a part by its flags; `choices`: what its first argument may be, where it takes one."""
    parser = argparse.ArgumentParser()
    if choices:
        parser.add_argument("what", choices=choices)
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing new after so long")
    parser.add_argument("--records", type=Path, help="append findings to this file instead of printing them")
    flags = parser.parse_args()
    recorder = Recorder(flags.records, flags.seconds, flags.small)
    run(*([flags.what] if choices else []), recorder)


def timed(call: Callable[[], Any], wait: Callable[[Any], Any], seconds: float = 2.0, most: int = 20) -> float:
    """Median seconds of a call after its first, which is not counted: at least three, for about `seconds`."""
    wait(call())
    found: list[float] = []
    while len(found) < 3 or (sum(found) < seconds and len(found) < most):
        began = time.perf_counter()
        wait(call())
        found.append(time.perf_counter() - began)
    return statistics.median(found)


# ---- lengths


@functools.cache
def lengths(small: bool) -> dict[str, Any]:
    """{"questions": [{"question", "prompts" [K], "concatenated", "answer"}], "passages": [...]}, in tokens.

    small: an eighth of the contexts' lengths.
    """
    every = json.loads(LENGTHS.read_text(encoding="utf-8"))
    if not small:
        return every
    shortened = [
        one | {"prompts": [length // 8 for length in one["prompts"]], "concatenated": one["concatenated"] // 8}
        for one in every["questions"]
    ]
    return {"questions": shortened, "passages": [max(length // 8, 3) for length in every["passages"]]}


def first_questions(count: int, small: bool) -> list[dict[str, Any]]:
    """The lengths of `count` questions: the first, again from the start where there are not so many."""
    return list(itertools.islice(itertools.cycle(lengths(small)["questions"]), count))


@functools.cache
def word_tokenizer(model: str, small: bool) -> Any:
    """A transformers tokenizer whose words w4, w5, ... are a token each, between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    # MPNet takes the id 1 for padding, whatever stands there.
    words = {"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3}
    words |= {f"w{i}": i for i in range(len(words), shape_of(model, small)["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    specials = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


def word_texts(model: str, small: bool) -> tuple[list[str], int]:
    """(texts of HotPotQA's passage lengths in those words, their tokens, specials included)."""
    chosen = lengths(small)["passages"]
    chosen = chosen[:64] if small else chosen * 4
    chosen = [min(length, LONGEST_TEXT[model]) for length in chosen]
    rng = random.Random(0)
    vocab_size = shape_of(model, small)["vocab_size"]
    texts = [" ".join(f"w{rng.randrange(4, vocab_size)}" for _ in range(length - 2)) for length in chosen]
    return texts, sum(chosen)


# ---- the device


# Dense bfloat16 FLOP/s of data sheets, by what jax and torch call the device.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """The data sheet's dense bfloat16 FLOP/s; None for a device that is not in the table."""
    return next((peak for name, peak in _PEAKS.items() if name in device_kind), None)


def utilisation(flops: float, seconds: float, device_kind: str) -> float | None:
    """Share of the device's peak."""
    peak = peak_flops(device_kind)
    return None if peak is None else flops / seconds / peak
