"""Models of given shapes with random weights made on the device, and batches of random tokens: no files."""

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ragjax.costs import ModelSize
from ragjax.data.batches import (
    Batch,
    Example,
    QuestionLengths,
    Shape,
    choose_shapes,
    fit_shape,
    make_batch,
    place_examples,
    round_up,
    sequence_lengths,
)
from ragjax.models.decoder import Decoder
from ragjax.models.decoder_config import DecoderConfig
from ragjax.models.lora import LoraConfig
from ragjax.pretrained import ENCODERS, abstract_decoder

Tree = Mapping[str, Any]

_DEVIATION = 0.02
_ADAPTERS = LoraConfig(rank=common.LORA_RANK, alpha=common.LORA_ALPHA)


def encoder(config: Mapping[str, Any], dtype: str = "float32") -> tuple[nn.Module, Tree]:
    """An embedder and its variables, float32."""
    config_type, module_type = ENCODERS[config["model_type"]]
    module = module_type(config_type.from_hf(config, dtype=dtype))
    return module, random_variables(module, "float32")


def decoder(
    config: Mapping[str, Any], dtype: str, quantize: str | None = None, lora: bool = False, remat: str = "full"
) -> tuple[Decoder, Tree]:
    """A generator and its variables: the base in `dtype` or quantised, adapters in float32."""
    module = Decoder(
        DecoderConfig.from_hf(config, dtype=dtype, quantize=quantize, lora=_ADAPTERS if lora else None, remat=remat)
    )
    return module, random_variables(module, dtype, method="full_logits")


def random_variables(module: nn.Module, dtype: str, method: str | None = None) -> Tree:
    """All collections of a module on the device; the frozen collection's floats in `dtype`."""

    def fill(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_frozen_float = name.startswith("params/") and leaf.dtype == jnp.float32 and not name.endswith("absmax")
        kept = jnp.dtype(dtype) if is_frozen_float else leaf.dtype
        return _fill(jax.random.key(zlib.crc32(name.encode())), leaf.shape, kept, name.rsplit("/", 1)[-1])

    return jax.tree_util.tree_map_with_path(fill, abstract_variables(module, method))


def abstract_variables(module: nn.Module, method: str | None = None) -> Tree:
    """Shapes and dtypes of all collections of a module."""
    inputs = [jax.ShapeDtypeStruct((1, 1), np.int32)] * 3
    return jax.eval_shape(functools.partial(module.init, method=method), jax.random.key(0), *inputs)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _fill(key: jax.Array, shape: tuple[int, ...], dtype: Any, kind: str) -> jax.Array:
    """One leaf. Layers repeat one matrix: what a product costs does not depend on it, but drawing 8e9 numbers takes
    long.
    """
    drawn = shape[-2:]
    if kind == "scale":
        filled = jnp.ones(drawn, dtype)
    elif kind == "bias":
        filled = jnp.zeros(drawn, dtype)
    elif kind == "codes":
        filled = jax.random.bits(key, drawn, jnp.uint8).astype(dtype)
    elif kind == "absmax":
        filled = jnp.full(drawn, 3 * _DEVIATION, dtype)
    else:
        filled = (_DEVIATION * jax.random.normal(key, drawn)).astype(dtype)
    return jnp.broadcast_to(filled, shape)


def model_size(module: nn.Module, variables: Tree) -> ModelSize:
    """Weights of a model for ragjax.costs, as if its kernels were stored in full."""
    config = module.config
    is_decoder = isinstance(module, Decoder)
    if is_decoder:
        layers = abstract_decoder(config)["params"]["layers"]
        width = config.num_attention_heads * config.head_dim
    else:
        layers, width = variables["params"]["encoder"]["layer"], config.hidden_size
    return ModelSize(
        layer_weights=sum(leaf.size for leaf in jax.tree.leaves(layers)),
        head_weights=config.vocab_size * config.hidden_size if is_decoder else 0,
        lora_weights=sum(leaf.size for leaf in jax.tree.leaves(variables.get("lora", {}))),
        layers=config.num_hidden_layers,
        attention_width=width,
    )


def examples(
    chosen: Sequence[Mapping[str, Any]], vocab_size: int, encoder_vocab_size: int, width: int
) -> list[Example]:
    """Questions of the given lengths with random tokens and random unit passage vectors [K, width]."""
    rng = np.random.default_rng(0)
    made = []
    for index, one in enumerate(chosen):
        vectors = rng.normal(size=(len(one["prompts"]), width))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        prompts = [rng.integers(3, vocab_size, length).tolist() for length in one["prompts"]]
        answer = rng.integers(3, vocab_size, one["answer"]).tolist()
        question = rng.integers(3, encoder_vocab_size, one["question"]).tolist()
        made.append(Example(index, question, vectors, prompts, answer))
    return made


@functools.cache
def run_shapes(questions: int, small: bool) -> tuple[Shape, ...]:
    """The shapes that a run on HotPotQA would compile for batches of so many questions."""
    every = common.lengths(small)["questions"]
    whole = [QuestionLengths([n + one["answer"] for n in one["prompts"]], one["answer"]) for one in every]
    return choose_shapes(whole, [each.answer for each in whole], questions, max(max(each.prompts) for each in whole))


def batch_of(made: Sequence[Example], small: bool) -> tuple[Batch, Shape, int]:
    """(the batch in its run's shape, that shape, real tokens that the generator reads)."""
    shapes = run_shapes(len(made), small)
    placed = place_examples(made, shapes[0].row_length)
    shape = fit_shape(shapes, placed)
    longest = round_up(max(one["question"] for one in common.lengths(small)["questions"]), 8)
    tokens = sum(sequence_lengths([e.prompts for e in made], [e.answer for e in made]))
    return make_batch(placed, shape, len(made), longest), shape, tokens


def memory_of(compiled: Any) -> int | None:
    """Bytes of device memory that a compiled program needs at its peak by XLA's own plan, arguments included."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    return int(
        found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    )


def peak_bytes() -> int | None:
    """The most device memory that this process has had in use so far."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
