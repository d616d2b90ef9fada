"""Writing parameters: a model's own tensors again, with what was trained in their place, and adapters alone.

Notable choices
- What was not trained is copied byte for byte from the source's files: its name, its dtype, and also what our models
  do not use. Nothing of it goes through our trees, whose base weights may be of another dtype or quantised.
- What was trained is stored in the dtype that the source has there; a GGUF source comes out as float32.
- The layout of every file is known before its first byte, and then one tensor at a time is made and written.
"""

import functools
import itertools
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flax import traverse_util

from ragjax.errors import UserError
from ragjax.files import PlannedFile, plan_json, read_pieces
from ragjax.weights import tables
from ragjax.weights.load import DTYPES, all_finite, read_config, read_safetensors_header
from ragjax.weights.resolve import ModelSource
from ragjax.weights.tables import Row, Table

MAX_SHARD_BYTES = 5_000_000_000
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensor:
    """One parameter on its way into a file; its bytes are made when they are written."""

    name: str
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterable[bytes | memoryview]]

    def read(self) -> np.ndarray:
        """Its values."""
        values = np.empty(self.shape, DTYPES[self.dtype])
        room, start = _bytes_of(values), 0
        for piece in self.pieces():
            room[start : start + len(piece)] = piece
            start += len(piece)
        return values


@dataclass(frozen=True)
class Trained:
    """What a run trained of one model: all its parameters, or the adapters of some matrices.

    Fields: `params` and `lora`, nested dicts of host arrays, {} for nothing; `lora_scale`, alpha / rank.
    """

    params: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    lora_scale: float = 0.0


# ---- tensors -----------------------------------------------------------------------------------------------


def trained_tensors(source: ModelSource, trained: Trained) -> list[Tensor]:
    """Every parameter of the source under the source's own names, with what was trained in its place.

    Raises UserError for a source that is damaged, and, when a tensor is made, for a trained value that the source's
    dtype cannot hold; ValueError for something trained that belongs to no parameter of the source, which is a bug.
    """
    config = read_config(source)
    table = tables.table_for(config["model_type"], source.name)
    changes = _Changes(trained, table)
    tensors = {}
    for tensor in _source_tensors(source, config):
        found = table.find(table.respell(tensor.name))
        make = found and changes.find(tensor, *found)
        tensors[tensor.name] = _made(tensor.name, tensor.dtype, tensor.shape, make) if make else tensor
    if changes.unplaced:
        raise ValueError(
            f"{source.name} has no parameter for {sorted(changes.unplaced, key=str)[0]}, which was trained"
        )
    return list(tensors.values())


def adapter_tensors(lora: Mapping[str, Any], model_type: str) -> list[Tensor]:
    """Adapters under the names that PEFT gives them: `lora_A` [rank, in] and `lora_B` [out, rank] of each layer."""
    rows = {row.path: row for row in tables.table_for(model_type, "the run's generator").rows}
    tensors = []
    for path, leaf in sorted(_flat(lora).items()):
        module, _, kind = path.rpartition("/")
        row, part = rows[f"{module}/kernel"], {"lora_a": "lora_A", "lora_b": "lora_B"}[kind]
        for layer, values in enumerate(leaf):
            name = f"base_model.model.{row.name(layer).removesuffix('.weight')}.{part}.weight"
            tensors.append(_made(name, "F32", values.shape[::-1], lambda values=values: values.T))
    return tensors


class _Changes:
    """Finds for each parameter of a source the function that makes its trained values."""

    def __init__(self, trained: Trained, table: Table):
        self._params, self._lora, self._scale = _flat(trained.params), _flat(trained.lora), trained.lora_scale
        self._tied = table.tied
        stacked = {row.path: row.stacked for row in table.rows}
        adapted = {
            f"{path.removesuffix('lora_a')}kernel": leaf for path, leaf in self._lora.items() if path.endswith("lora_a")
        }
        # (path, layer) of all that was trained and has not met its parameter yet.
        self.unplaced = {
            (path, layer)
            for path, leaf in (self._params | adapted).items()
            for layer in (range(len(leaf)) if stacked.get(path) else [None])
        }

    def find(self, tensor: Tensor, row: Row, layer: int | None) -> Callable[[], np.ndarray] | None:
        """None where the parameter was not trained. `row` and `layer`: of this parameter."""
        place = ... if layer is None else layer
        if row.path in self._params:
            self.unplaced.discard((row.path, layer))
            values = self._params[row.path][place]
            return lambda: values.T if row.transposed else values
        if self._tied and row.path == self._tied[0] and self._tied[1] in self._params:
            embedding = self._params[self._tied[1]]
            return lambda: embedding  # a tied head that the source holds all the same
        if (row.path, layer) in self.unplaced:
            self.unplaced.discard((row.path, layer))
            module = row.path.removesuffix("kernel")
            lora_a, lora_b = self._lora[f"{module}lora_a"][place], self._lora[f"{module}lora_b"][place]
            return lambda: _merge(tensor.read(), lora_a, lora_b, self._scale)
        return None


def _merge(weight: np.ndarray, lora_a: np.ndarray, lora_b: np.ndarray, scale: float) -> np.ndarray:
    """W + scale * A B in float32: weight [out, in], lora_a [in, r], lora_b [r, out]; a float64 weight stays one."""
    delta = np.matmul(lora_b.T, lora_a.T * np.float32(scale), dtype=np.float32)
    return weight.astype(np.promote_types(weight.dtype, np.float32), copy=False) + delta


def _flat(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    leaves = traverse_util.flatten_dict(dict(tree), sep="/")
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def _made(name: str, dtype: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> Tensor:
    """A tensor whose values `make` computes."""
    stored = np.dtype(DTYPES[dtype])

    def pieces() -> Iterator[memoryview]:
        values = make()
        if values.shape != shape:
            raise ValueError(f"{name} has the shape {shape}, but {values.shape} was trained")
        with np.errstate(over="ignore"):  # refused in words below
            values = np.ascontiguousarray(values.astype(stored, copy=False))
        if not all_finite(values):
            raise UserError(
                f"a trained value of {name} does not fit into {dtype}, in which the source stores it: train from a "
                "float32 or bfloat16 copy of the model"
            )
        yield _bytes_of(values)

    return Tensor(name, dtype, shape, math.prod(shape) * stored.itemsize, pieces)


def _bytes_of(values: np.ndarray) -> memoryview:
    return values.reshape(-1).view(np.uint8).data


def _source_tensors(source: ModelSource, config: Mapping[str, Any]) -> Iterator[Tensor]:
    """The parameters as they lie in the source's files; a GGUF file's dequantised, under Hugging Face's names."""
    if source.format == "gguf":
        yield from _gguf_tensors(source, config)
        return
    for file in source.files:
        for stored in read_safetensors_header(file):  # refuses a damaged file
            start, end = stored.span
            pieces = functools.partial(read_pieces, file, start, end - start)
            yield Tensor(stored.key, stored.dtype, stored.shape, end - start, pieces)


def _gguf_tensors(source: ModelSource, config: Mapping[str, Any]) -> Iterator[Tensor]:
    from ragjax.weights import gguf

    file = gguf.read_gguf(source.path)
    for stored in gguf.stored_tensors(file):
        make = functools.partial(gguf.read_tensor, file, stored.key, config)
        yield _made(stored.name, "F32", stored.shape, make)


# ---- files -------------------------------------------------------------------------------------------------


def plan_weights(folder: str, tensors: Sequence[Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[PlannedFile]:
    """model.safetensors, or shards of at most `max_shard_bytes` of parameters with their index.

    A parameter that is larger than that has a shard of its own. `folder`: path of theirs inside the whole export.
    """
    shards: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    if len(shards) == 1:
        return [plan_safetensors(f"{folder}/model.safetensors", tensors)]
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    files = [plan_safetensors(f"{folder}/{name}", shard) for name, shard in zip(names, shards, strict=True)]
    places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return [*files, plan_json(f"{folder}/{INDEX_FILE}", index)]


def _width(tensor: Tensor) -> float:
    """Bytes of one number; infinity where there is none."""
    numbers = math.prod(tensor.shape)
    return tensor.nbytes / numbers if numbers else math.inf


def plan_safetensors(path: str, tensors: Sequence[Tensor]) -> PlannedFile:
    """One safetensors file: the length of its header, the header, the parameters one behind the other."""
    # Widest numbers first, so that every parameter lies at a multiple of its numbers' size.
    tensors = sorted(tensors, key=_width, reverse=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterable[bytes | memoryview]:
        parameters = (tensor.pieces() for tensor in tensors)
        return itertools.chain([struct.pack("<Q", len(text)), text], itertools.chain.from_iterable(parameters))

    return PlannedFile(path, 8 + len(text) + end, pieces)
