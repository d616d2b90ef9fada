"""GGUF files of LLaMA, Qwen2 and Qwen3 models: settings, tensors, metadata. Only this file imports `gguf`.

Notable choices
- Settings come out in Hugging Face's spelling and tensors under Hugging Face's names, so that both formats go
  through the same tables and the same model code.
- Every key of the architecture (`llama.*`) is either understood here or refused by name: one that was overlooked
  would change the answers.
- GGUF orders the rows of a LLaMA's q and k for rotary pairs (2i, 2i + 1), Hugging Face for halves (i, i + H/2); see
  `unpermute`. A Qwen's stay as they are.
- Llama 3.1's scaling of the rotary frequencies is stored as numbers (`rope_freqs.weight`), which are compared with
  what the published settings make.
- A model may be split over files NAME-00001-of-00003.gguf: settings stand in the first, and any one names them all.
- Parsing the metadata of a real file takes seconds (two strings for each word of the vocabulary), and the
  resolver, the config, the weights and the tokenizer all want it: the last files read are kept.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ragjax.errors import UserError, reason
from ragjax.models.rope import Llama3Rope, RopeScaling
from ragjax.weights import tables

# GGUF's name of an architecture (Mistral's files say "llama") -> Hugging Face's class; the model_type is the same.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SCALINGS = ("none", "linear", "yarn")  # values of rope.scaling.type
UNQUANTISED = ("F32", "F16", "BF16", "F64")

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_ROPE_FREQS = "rope_freqs.weight"
# Llama 3.1's to 3.3's; the factor is the largest number in the file.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
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
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",  # a remark
    "rope.scale_linear",  # how older files spell a linear factor
    "tensor_data_layout",  # a remark
}
# Further settings, let through with the value that changes nothing.
_NEUTRAL = {"rope.scaling.attn_factor": 1.0, "attention.causal": True, "expert_count": 0, "expert_used_count": 0}


@dataclass(frozen=True)
class GgufFile:
    """A parsed model: its first file, `metadata` as Python values, `tensors` by GGUF name (still mapped, not read)."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, gguf.ReaderTensor]

    @property
    def architecture(self) -> Any:
        return self.metadata.get("general.architecture")


class _Reader(gguf.GGUFReader):
    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = np.asarray(mapped)  # slices of a plain view of the map cost a third of slices of a memmap


def part_files(path: str | os.PathLike) -> tuple[Path, ...]:
    """The files that a model is split over, by the name of any of them; the file itself where it is whole.

    Raises UserError naming the first part that is not there.
    """
    path = Path(path)
    match = _PART.fullmatch(path.name)
    if not match:
        return (path,)
    name, _, count = match.groups()
    parts = tuple(path.with_name(f"{name}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1))
    for part in parts:
        if not part.is_file():
            raise UserError(f"{part} is missing, one of the {len(parts)} parts of {path.name}: download or copy it too")
    return parts or (path,)


def read_gguf(path: str | os.PathLike) -> GgufFile:
    """Parses a GGUF file, and all parts of the model that it is a part of. Raises UserError when one is missing, is
    not a GGUF file, or is truncated."""
    stamps = []
    for part in part_files(path):
        try:
            stat = part.stat()
        except OSError as error:
            raise UserError(
                f"{part} could not be read ({error.strerror or error}): check its name and permissions"
            ) from error
        stamps.append((part, stat.st_size, stat.st_mtime_ns))
    return _read_parts(tuple(stamps))


@lru_cache(maxsize=2)
def _read_parts(stamps: tuple[tuple[Path, int, int], ...]) -> GgufFile:
    """`stamps`: path, size and time of change of each part."""
    files = [_read_part(path, size) for path, size, _ in stamps]
    first = files[0]
    for number, file in enumerate(files):
        stands = file.metadata.get("split.no", 0), file.metadata.get("split.count", 1) or 1
        if stands != (number, len(files)):
            raise UserError(
                f"{file.path} is part {stands[0] + 1} of {stands[1]} by its own data, not what its name says: give all "
                f"parts back the names that they were published under (NAME-00001-of-{stands[1]:05}.gguf)"
            )
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    return GgufFile(first.path, first.metadata, tensors)


def _read_part(path: Path, size: int) -> GgufFile:
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path} is not a GGUF file: pass a .gguf file or a Hugging Face folder")
        # A damaged length can overflow in the reader's own arithmetic; what follows is an error all the same.
        with np.errstate(over="ignore"):
            reader = _Reader(path)
            metadata = {key: field.contents() for key, field in reader.fields.items()}
    except OSError as error:
        raise UserError(
            f"{path} could not be read ({error.strerror or error}): check its name and permissions"
        ) from error
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
    """A config.json made from the metadata, `eos_token_id` and `bos_token_id` included.

    Raises UserError for another architecture, a missing setting, or one that the decoder does not follow.
    """
    architecture = file.architecture
    if architecture not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise UserError(
            f"{file.path}: the GGUF architecture {architecture!r} is not supported, only {known} are: choose "
            "another model"
        )
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path} has no tensor token_embd.weight: it is not a whole model; choose another file")
    _refuse_unknown_settings(file)
    config: dict[str, Any] = {name: _setting(file, key) for name, key in _SETTINGS.items()}
    heads = config["num_attention_heads"]
    head_dim = _setting(file, "attention.key_length", config["hidden_size"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _setting(file, key, head_dim) != head_dim:
            raise UserError(
                f"{file.path}: {architecture}.{key} = {_setting(file, key)} differs from the head width "
                f"{head_dim}, which is not supported: choose another model"
            )
    theta = float(_setting(file, "rope.freq_base", 10000.0))
    config |= {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        # Stored as float32: the shortest decimal that rounds to it is what config.json held (1e-05).
        "rms_norm_eps": float(str(np.float32(config["rms_norm_eps"]))),
        "num_key_value_heads": _setting(file, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, theta, head_dim, config["max_position_embeddings"]),
        "vocab_size": int(file.tensors["token_embd.weight"].shape[1]),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float32",
    }
    return config | _special_ids(file)


def _setting(file: GgufFile, key: str, default: float | None = None) -> Any:
    value = file.metadata.get(f"{file.architecture}.{key}", default)
    if not isinstance(value, int | float):
        raise UserError(
            f"{file.path}: {file.architecture}.{key} is {value!r} where one number is needed: choose another file of "
            "this model"
        )
    return value


def _refuse_unknown_settings(file: GgufFile) -> None:
    for key, value in file.metadata.items():
        prefix, _, name = key.partition(".")
        if prefix == file.architecture and name not in _UNDERSTOOD and _NEUTRAL.get(name, ...) != value:
            raise UserError(
                f"{file.path}: the setting {key} = {str(value)[:40]} is not supported: choose another model"
            )


def _rope_scaling(file: GgufFile, theta: float, width: int, context: int) -> dict[str, Any] | None:
    """config.json's rope_scaling from rope.scaling.* or rope_freqs.weight."""
    named, stored = _named_scaling(file, context), _rope_freqs(file, theta, width)
    if named and stored:
        raise UserError(
            f"{file.path} scales its rotary frequencies twice, by {file.architecture}.rope.scaling and by "
            f"{_ROPE_FREQS}, which is not supported: use the model's Hugging Face folder"
        )
    return named or stored


def _named_scaling(file: GgufFile, context: int) -> dict[str, Any] | None:
    """Of rope.scaling.*, where llama.cpp takes "linear" for a kind that is not named."""
    kind = file.metadata.get(f"{file.architecture}.rope.scaling.type", "linear")
    if kind not in SCALINGS:
        raise UserError(
            f"{file.path}: the setting {file.architecture}.rope.scaling.type = {kind} is not supported, only "
            f"{', '.join(SCALINGS)} are: choose another model"
        )
    factor = float(_setting(file, "rope.scaling.factor", _setting(file, "rope.scale_linear", 0)))
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = _setting(file, "rope.scaling.original_context_length", context)
        scaling["original_max_position_embeddings"] = int(original)
    return scaling


def _rope_freqs(file: GgufFile, theta: float, width: int) -> dict[str, Any] | None:
    """Llama 3.1's rope_scaling where the file's divisors of the rotary frequencies are those that it makes."""
    if _ROPE_FREQS not in file.tensors:
        return None
    tensor = file.tensors[_ROPE_FREQS]
    divisors = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
    if np.all(divisors == 1):
        return None
    settings: dict[str, Any] = {"factor": float(divisors.max()), **_LLAMA3}
    lengths = np.empty(0, np.int64)  # which neither of the two follows
    plain, scaled = (rope.frequencies(theta, width, lengths) for rope in (RopeScaling(), Llama3Rope(**settings)))
    if divisors.shape != plain.shape or not np.allclose(divisors, plain / scaled, rtol=1e-5):
        raise UserError(
            f"{file.path}: {_ROPE_FREQS} divides its rotary frequencies by other numbers than Llama 3.1's, which is "
            "not supported: use the model's Hugging Face folder"
        )
    return {"rope_type": "llama3", **settings}


def _special_ids(file: GgufFile) -> dict[str, Any]:
    ids = {
        f"{name}_token_id": file.metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in file.metadata
    }
    ends = [file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    if len(ends) > 1:
        ids["eos_token_id"] = ends  # a list, as config.json of such models has it
    return ids


def stored_tensors(file: GgufFile) -> Iterator[tables.Stored]:
    """Every parameter of the file under its Hugging Face name, or its own where the table knows none."""
    for tensor in file.tensors.values():
        if tensor.name == _ROPE_FREQS:  # a setting: see `read_config`
            continue
        found = _find(tensor.name)
        name = tensor.name if found is None else found[0].hf.format(**found[1].groupdict())
        shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF counts dimensions from the fastest
        yield tables.Stored(name, file.path, tensor.name, shape, tensor.tensor_type.name)


def read_tensor(file: GgufFile, key: str, config: Mapping[str, Any]) -> np.ndarray:
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
    found = _find(key)
    heads = None if found is None else found[0].heads
    return unpermute(values, config[heads]) if heads and file.architecture == "llama" else values


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k matrix, or of its bias, from GGUF's rotary order back to Hugging Face's.

    GGUF puts row i of the first half of a head beside row i of the second half, because llama.cpp rotates
    neighbours. weight [heads * H, ...] -> [heads * H, ...].
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _find(name: str) -> tuple[tables.GgufRow, re.Match[str]] | None:
    for row in tables.GGUF_LLAMA:
        if match := row.pattern.fullmatch(name):
            return row, match
    return None
