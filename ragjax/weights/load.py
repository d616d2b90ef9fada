"""Settings and parameters of a model, from a Hugging Face folder or a GGUF file, without torch.

The engine walks a table (tables.py) and fails on any parameter that is unmapped, missing, doubly set or
misshaped.

Notable choices
- Names and shapes of all files are checked against the model before the first number is read: a mistake costs
  no time.
- Leaf by leaf: `place` makes each array of the parts that it asks for, such as the share of each device, before the
  next is begun. Each tensor's part goes straight into its slice of the layer-stacked part, in the final dtype, or
  quantised a layer at a time. So host memory above the final arrays stays under twice the largest leaf.
"""

import functools
import itertools
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # also teaches numpy the name "bfloat16"
import numpy as np
import safetensors
from flax import traverse_util

from ragjax.errors import UserError, reason
from ragjax.files import read_settings
from ragjax.models.quantize import quantize as quantize_kernel
from ragjax.settings import Settings
from ragjax.weights import tables
from ragjax.weights.resolve import ModelSource
from ragjax.weights.tables import Stored, StoredBytes, Table

_STRIP = 64  # columns that are copied at once
_PIECE = 1 << 18  # numbers that are checked at once
# Whole numbers as wide as so many bytes.
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

# A part of an array, a slice for each dimension; () is all of it.
Index = tuple[slice, ...]
_WHOLE: Index = ()
# Gives a part of a stored parameter, in the file's orientation.
Read = Callable[[Stored, Index], np.ndarray]
# Makes an array of its path and shape, and of what gives its parts.
Place = Callable[[str, tuple[int, ...], Callable[[Index], np.ndarray]], Any]

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


# ---- settings ----------------------------------------------------------------------------------------------


def read_config(source: ModelSource) -> Settings:
    """A model's config in Hugging Face's spelling: config.json, or the same made from GGUF metadata.

    One field is added: `end_token_ids`, the ids at which generation stops, each once: every end id of
    config.json, then of generation_config.json; [] for a model that has none. Raises UserError for an
    unreadable config.json and for a model type or GGUF setting that is not supported.
    """
    files = _settings(source)
    ends = dict.fromkeys(index for settings in files for index in settings.token_ids("eos_token_id"))
    return Settings(files[0] | {"end_token_ids": list(ends)}, files[0].where)


def check_token_ids(source: ModelSource, vocab_size: int) -> None:
    """Raises UserError, naming file and key, where a token that begins or ends a text lies beyond the vocabulary.

    A padding token may: texts are padded by their lengths.
    """
    for settings in _settings(source):
        for key in ("bos_token_id", "eos_token_id"):
            if any(index >= vocab_size for index in settings.token_ids(key)):
                raise settings.fault(key, f", but the model's vocabulary ends at {vocab_size - 1}: correct it")


def _settings(source: ModelSource) -> list[Settings]:
    """The model's settings, then those of its generation, which may be none."""
    if source.format == "gguf":
        from ragjax.weights import gguf

        return [Settings(gguf.read_config(gguf.read_gguf(source.path)), source.path)]
    config = read_settings(source.path / "config.json")
    tables.table_for(config.get("model_type"), config.where)
    return [config, read_settings(source.path / "generation_config.json")]


# ---- parameters --------------------------------------------------------------------------------------------


def _on_host(path: str, shape: tuple[int, ...], read: Callable[[Index], np.ndarray]) -> np.ndarray:
    return read((slice(None),) * len(shape))


def load_params(
    source: ModelSource,
    abstract_params: Mapping[str, Any],
    dtype: Any = None,
    quantize: str | None = None,
    place: Place = _on_host,
    table: Table | None = None,
) -> dict[str, Any]:
    """Reads a model's parameters into the tree that the model was built with.

    Args:
        source: from `resolve_model`.
        abstract_params: nested dict of jax.ShapeDtypeStruct, as `jax.eval_shape` of the (unquantised) model's
            init gives it.
        dtype: of all returned arrays ("float32", "bfloat16", a numpy dtype); None takes each leaf's own.
        quantize: "int8" or "nf4" stores the layers' kernels so (ragjax.models.quantize).
        place: makes each array; `Arrangement.load` on devices.
        table: where the parameters go; by default the table of the embedder or generator of this model type.

    Returns a nested dict of (placed) arrays with the same paths and shapes, a dict of arrays in place of a quantised
    kernel. Raises UserError for a truncated or foreign file, for a parameter that is unmapped, missing, doubly set or
    misshaped (naming it, the path, both shapes), and for one that is not finite.
    """
    config = read_config(source)
    table = table or tables.table_for(config["model_type"], source.name)
    leaves = traverse_util.flatten_dict(dict(abstract_params), sep="/")
    with ExitStack() as stack:
        stored, read = _open_gguf(source, config) if source.format == "gguf" else _open_safetensors(source, stack)
        if method := tables.quantisation_of(entry.name for entry in stored):
            raise UserError(tables.quantised_message(source.path, method))
        plan = plan_params(stored, table, leaves, source.path)
        for step in plan:
            if step.tied_to is not None:
                embedding = next(other.stored for other in plan if other.path == step.tied_to)
                _check_tied(step.stored, read(step.stored, _WHOLE), read(embedding, _WHOLE))
        chosen = sorted((step for step in plan if step.tied_to is None), key=lambda step: (step.path, step.layer or 0))
        arrays = {}
        for path, group in itertools.groupby(chosen, key=lambda step: step.path):
            steps, leaf = list(group), leaves[path]
            if quantize and path.startswith("layers/") and path.endswith("/kernel"):
                for name, part in _read_quantised(steps, read, quantize).items():
                    arrays[f"{path}/{name}"] = place(f"{path}/{name}", part.shape, part.__getitem__)
            else:
                wanted = np.dtype(leaf.dtype if dtype is None else dtype)
                arrays[path] = place(path, leaf.shape, functools.partial(_read_part, steps, read, wanted))
    return traverse_util.unflatten_dict(arrays, sep="/")


def _read_part(steps: Sequence["Step"], read: Read, dtype: np.dtype, index: Index) -> np.ndarray:
    """A part of a leaf, put together from its layers' parts."""
    layered = steps[0].layer is not None
    chosen, inner = (steps[index[0]], index[1:]) if layered else (steps, index)

    def part_of(step: Step) -> np.ndarray:
        values = read(step.stored, inner[::-1] if step.transposed else inner)
        _check_finite(step.stored, values)
        # Converted before it is transposed, which is several times faster than both at once.
        values = values.astype(dtype, copy=False)
        return values.T if step.transposed else values

    first = part_of(chosen[0])
    if not layered:
        return first
    whole = np.empty((len(chosen), *first.shape), dtype)
    _copy(whole[0], first)
    for place, step in enumerate(chosen[1:], start=1):
        _copy(whole[place], part_of(step))
    return whole


def _read_quantised(steps: Sequence["Step"], read: Read, kind: str) -> dict[str, np.ndarray]:
    """The arrays of a quantised kernel, put together from its layers; one layer at a time is there in full."""
    whole: dict[str, np.ndarray] = {}
    for place, step in enumerate(steps):
        values = read(step.stored, _WHOLE)
        _check_finite(step.stored, values)
        for name, part in _quantize_transposed(values, kind).items():
            whole.setdefault(name, np.empty((len(steps), *part.shape), part.dtype))[place] = part
    return whole


def _copy(target: np.ndarray, values: np.ndarray) -> None:
    """target[...] = values, in strips: where `values` is a transposed matrix, that is five times faster."""
    for start in range(0, values.shape[-1], _STRIP):
        target[..., start : start + _STRIP] = values[..., start : start + _STRIP]


@functools.partial(jax.jit, static_argnames="kind")
def _quantize_transposed(weight: jax.Array, kind: str) -> dict[str, jax.Array]:
    return quantize_kernel(weight.T, kind)


@dataclass(frozen=True)
class Step:
    """Where one stored parameter goes: a leaf's `path`, and the `layer` in it."""

    stored: Stored
    path: str
    layer: int | None = None
    transposed: bool = False
    tied_to: str | None = None  # of a head that is no leaf: the path of the embedding, which it has to equal


def plan_params(stored: Iterable[Stored], table: Table, leaves: Mapping[str, Any], where: Path) -> list[Step]:
    """Assigns every stored parameter its place, from names and shapes alone.

    Args: `leaves`, the model's abstract leaves by path ("layers/mlp/up_proj/kernel"); `where`, the folder or
    file to blame. Raises UserError for a parameter that is unmapped, has no place in this model, is doubly
    set or misshaped, and for a leaf that nothing fills; ValueError for a leaf that the table does not know,
    which is a bug.
    """
    plan: dict[tuple[str | None, int | None], Step] = {}
    for entry in stored:
        name = table.respell(entry.name)
        if table.is_unused(name):
            continue
        found = table.find(name)
        if found is None:
            raise UserError(
                f"{entry.file}: the parameter {entry.key} is unknown for this model type: check that "
                "config.json belongs to these weights"
            )
        row, layer = found
        tied_to = table.tied[1] if table.tied and row.path == table.tied[0] and row.path not in leaves else None
        step = Step(entry, row.path, layer, row.transposed, tied_to)
        if tied_to is None:
            _check_place(step, leaves)
        if (step.path, layer) in plan:
            other = plan[step.path, layer].stored
            raise UserError(
                f"{entry.file}: {entry.key} and {other.key} of {other.file.name} both set {row.path}"
                f"{'' if layer is None else f' of layer {layer}'}: remove one of them"
            )
        plan[step.path, layer] = step
    _check_complete(plan, table, leaves, where)
    return list(plan.values())


def _check_place(step: Step, leaves: Mapping[str, Any]) -> None:
    entry = step.stored
    if step.path not in leaves:
        raise UserError(
            f"{entry.file}: the parameter {entry.key} ({step.path}) has no place in the model that "
            "config.json describes: check that config.json belongs to these weights"
        )
    needed = tuple(leaves[step.path].shape)
    if step.layer is not None:
        if step.layer >= needed[0]:
            raise UserError(
                f"{entry.file}: the parameter {entry.key} is of layer {step.layer}, but config.json gives "
                f"the model {needed[0]} layers: check that config.json belongs to these weights"
            )
        needed = needed[1:]
    needed = needed[::-1] if step.transposed else needed
    if entry.shape != needed:
        raise UserError(
            f"{entry.file}: the parameter {entry.key} ({step.path}) has the shape {entry.shape}, but "
            f"config.json asks for {needed}: check that config.json belongs to these weights"
        )


def _check_complete(plan: Mapping, table: Table, leaves: Mapping[str, Any], where: Path) -> None:
    rows = {row.path: row for row in table.rows}
    if unknown := sorted(set(leaves) - set(rows)):
        raise ValueError(f"no row of the weight table fills {unknown}")
    missing = []
    for path, leaf in leaves.items():
        layers = range(leaf.shape[0]) if rows[path].stacked else [None]
        missing += [(rows[path].name(layer), path) for layer in layers if (path, layer) not in plan]
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise UserError(
            f"{where}: the parameter {missing[0][0]} ({missing[0][1]}){more} missing: check that the weights are "
            "complete and that config.json belongs to them"
        )


def _check_tied(entry: Stored, head: np.ndarray, embedding: np.ndarray) -> None:
    """Refuses a head [V, D] that config.json ties to the embedding [V, D] but that differs from it."""
    if not np.array_equal(head, embedding):
        raise UserError(
            f"{entry.file}: config.json ties the head to the embedding, but {entry.key} differs from it: set "
            "tie_word_embeddings to false in config.json or remove the parameter"
        )


def _check_finite(entry: Stored, values: np.ndarray) -> None:
    if not all_finite(values):
        raise UserError(
            f"{entry.file}: the parameter {entry.key} has numbers that are not finite (NaN or infinity): download or "
            "copy it again, or train it again from weights that are"
        )


def all_finite(values: np.ndarray) -> bool:
    """Whether no number is NaN or infinite, that is, has all bits of its exponent set: quicker than to compute it."""
    bits = _UNSIGNED[values.dtype.itemsize]
    exponent = np.asarray(np.inf, values.dtype).view(bits)
    numbers = values.reshape(-1).view(bits)
    # In pieces that stay in the processor's cache.
    pieces = (numbers[start : start + _PIECE] for start in range(0, numbers.size, _PIECE))
    return not any(((piece & exponent) == exponent).any() for piece in pieces)


# ---- files -------------------------------------------------------------------------------------------------


def _open_gguf(source: ModelSource, config: dict[str, Any]) -> tuple[list[Stored], Read]:
    from ragjax.weights import gguf

    file = gguf.read_gguf(source.path)
    return list(gguf.stored_tensors(file)), lambda entry, index: gguf.read_tensor(file, entry.key, config)[index]


def _open_safetensors(source: ModelSource, stack: ExitStack) -> tuple[list[Stored], Read]:
    stored, handles = [], {}
    for file in source.files:
        stored += read_safetensors_header(file)
        try:
            handles[file] = stack.enter_context(safetensors.safe_open(file, framework="numpy"))
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({reason(error)}): download or copy it again") from error

    def read(entry: Stored, index: Index) -> np.ndarray:
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{entry.file}: the parameter {entry.key} is stored as {entry.dtype}, but only "
                f"{', '.join(DTYPES)} are read: save the model again in one of these"
            )
        return handles[entry.file].get_slice(entry.key)[index]

    return stored, read


def _shifted(offsets: list[int], by: int) -> tuple[int, int]:
    start, end = offsets
    return by + start, by + end


def read_safetensors_header(path: Path) -> list[StoredBytes]:
    """The parameters that a safetensors file holds, from its header.

    Raises UserError for a file that is truncated or not safetensors; the mapped reader would report it in its
    own words, or only once the missing bytes are touched.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if size < 8 + length:
            raise UserError(
                f"{path} is truncated at {size:,} bytes, or not a safetensors file: download or copy it again"
            )
        try:
            header = json.loads(file.read(length))
            tensors = {key: value for key, value in header.items() if key != "__metadata__"}
            end = 8 + length + max((value["data_offsets"][1] for value in tensors.values()), default=0)
            stored = [
                StoredBytes(
                    key, path, key, tuple(value["shape"]), value["dtype"], _shifted(value["data_offsets"], 8 + length)
                )
                for key, value in tensors.items()
            ]
        except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path} has no valid safetensors header: download or copy it again") from error
    if size != end:
        raise UserError(
            f"{path} is truncated or damaged: it has {size:,} bytes where its header promises {end:,}; "
            "download or copy it again"
        )
    return stored
