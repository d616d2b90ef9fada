"""GGUF files of the llama architecture: settings, tensors, metadata. Only this file imports `gguf`.

Notable choices
- Settings come out in Hugging Face's spelling and tensors under Hugging Face's names, so that both formats go
  through the same tables and the same model code.
- Every `llama.*` key is either understood here or refused by name: one that was overlooked would change the
  answers.
- GGUF orders the rows of q and k for rotary pairs (2i, 2i + 1), Hugging Face for halves (i, i + H/2); see
  `unpermute`.
- Parsing the metadata of a real file takes seconds (two strings for each word of the vocabulary), and the
  resolver, the config, the weights and the tokenizer all want it: the last files read are kept.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ragjax.errors import UserError, reason
from ragjax.weights import tables

UNQUANTISED = ("F32", "F16", "BF16", "F64")

_SETTINGS = {  # our config's field: GGUF key behind "llama."
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_UNDERSTOOD = {
    *_SETTINGS.values(),
    "vocab_size",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
}
# Further settings, let through with the value that changes nothing.
_NEUTRAL = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0}


@dataclass(frozen=True)
class GgufFile:
    """A parsed file: `metadata` as Python values, `tensors` by GGUF name (still mapped, not read)."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]


class _Reader(gguf.GGUFReader):
    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = np.asarray(mapped)  # slices of a plain view of the map cost a third of slices of a memmap


def read_gguf(path: str | os.PathLike) -> GgufFile:
    """Parses a GGUF file. Raises UserError when it is not one, or truncated."""
    path = Path(path)
    try:
        stat = path.stat()
        return _read_gguf(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(
            f"{path} could not be read ({error.strerror or error}): check its name and permissions"
        ) from error


@lru_cache(maxsize=2)
def _read_gguf(path: Path, size: int, mtime_ns: int) -> GgufFile:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: pass a .gguf file or a Hugging Face folder")
    try:
        # A damaged length can overflow in the reader's own arithmetic; what follows is an error all the same.
        with np.errstate(over="ignore"):
            reader = _Reader(path)
            metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(
            f"{path} is truncated or damaged at {size:,} bytes ({type(error).__name__}: {reason(error)}): download "
            "or copy it again"
        ) from error
    return GgufFile(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def quantization(file: GgufFile) -> str | None:
    """The storage type that holds most of the numbers, as GGUF calls it (Q4_1); None when that is a float type."""
    numbers = Counter()
    for tensor in file.tensors.values():
        numbers[tensor.tensor_type.name] += tensor.n_elements
    name = numbers.most_common(1)[0][0] if numbers else "F32"
    return None if name in UNQUANTISED else name


def read_config(file: GgufFile) -> dict[str, Any]:
    """A llama config.json made from the metadata, `eos_token_id` and `bos_token_id` included.

    Raises UserError for another architecture, a missing setting, or one that the decoder does not follow.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{file.path}: the GGUF architecture {architecture!r} is not supported, only 'llama' is: choose "
            "another model"
        )
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path} has no tensor token_embd.weight: it is not a whole model; choose another file")
    _refuse_unknown_settings(file)
    config: dict[str, Any] = {name: _setting(file, key) for name, key in _SETTINGS.items()}
    heads = config["num_attention_heads"]
    head_dim = _setting(file, "attention.key_length", config["hidden_size"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.metadata.get(f"llama.{key}", head_dim) != head_dim:
            raise UserError(
                f"{file.path}: llama.{key} = {file.metadata[f'llama.{key}']} differs from the head width "
                f"{head_dim}, which is not supported: choose another model"
            )
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        # Stored as float32: the shortest decimal that rounds to it is what config.json held (1e-05).
        "rms_norm_eps": float(str(np.float32(config["rms_norm_eps"]))),
        "num_key_value_heads": _setting(file, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": float(_setting(file, "rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "vocab_size": int(file.tensors["token_embd.weight"].shape[1]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float32",
    }
    return config | _special_ids(file)


def _setting(file: GgufFile, key: str, default: float | None = None) -> Any:
    value = file.metadata.get(f"llama.{key}", default)
    if not isinstance(value, int | float):
        raise UserError(
            f"{file.path}: llama.{key} is {value!r} where one number is needed: choose another file of this model"
        )
    return value


def _refuse_unknown_settings(file: GgufFile) -> None:
    for key, value in file.metadata.items():
        prefix, _, name = key.partition(".")
        if prefix == "llama" and name not in _UNDERSTOOD and _NEUTRAL.get(name, ...) != value:
            raise UserError(
                f"{file.path}: the setting {key} = {str(value)[:40]} is not supported: choose another model"
            )


def _special_ids(file: GgufFile) -> dict[str, Any]:
    ids = {
        f"{name}_token_id": file.metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in file.metadata
    }
    ends = [file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    if len(ends) > 1:
        ids["eos_token_id"] = ends  # a list, as config.json of such models has it
    return ids


def stored_tensors(file: GgufFile) -> Iterator[tables.Stored]:
    """Every tensor of the file under its Hugging Face name, or its own where the table knows none."""
    for tensor in file.tensors.values():
        row, match = _find(tensor.name)
        name = row.hf.format(**match.groupdict()) if row else tensor.name
        shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF counts dimensions from the fastest
        yield tables.Stored(name, file.path, tensor.name, shape, tensor.tensor_type.name)


def read_tensor(file: GgufFile, key: str, config: dict[str, Any]) -> np.ndarray:
    """One tensor, dequantised to float32, in Hugging Face's shape and order.

    Args: `key`, its GGUF name; `config`, from `read_config`. Raises UserError for a storage type that the
    gguf package cannot dequantise.
    """
    tensor = file.tensors[key]
    try:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except NotImplementedError as error:
        raise UserError(
            f"{file.path}: {key} is stored as {tensor.tensor_type.name}, which cannot be dequantised: use "
            "another quantisation of this model, such as Q8_0 or Q4_1"
        ) from error
    row, _ = _find(key)
    return unpermute(values, config[row.heads]) if row and row.heads else values


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k matrix from GGUF's rotary order back to Hugging Face's.

    GGUF puts row i of the first half of a head beside row i of the second half, because llama.cpp rotates
    neighbours. weight [heads * H, D] -> [heads * H, D].
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _find(name: str) -> tuple[tables.GgufRow, Any] | tuple[None, None]:
    for row in tables.GGUF_LLAMA:
        if match := row.pattern.fullmatch(name):
            return row, match
    return None, None
