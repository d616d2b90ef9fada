"""The models of a run as shapes: config.json and, where it is there, the tokenizer. No weights are read."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ragjax.arrays import ModelVariables, Tree
from ragjax.config import RunConfig
from ragjax.models.decoder import Decoder
from ragjax.models.decoder_config import DecoderConfig
from ragjax.models.lora import COLLECTION
from ragjax.pipeline import lora_of
from ragjax.pretrained import Embedder, Generator, abstract_variables, encoder_of
from ragjax.settings import Settings
from ragjax.weights import ModelSource, load_tokenizer, read_config, read_embedder_settings, resolve_settings

# Files that hold a tokenizer which can be read.
_TOKENIZERS = ("tokenizer.json", "vocab.txt")


@dataclasses.dataclass(frozen=True)
class ShapedModels:
    """Models whose arrays are shapes, and whose tokenizer may be None: `ragjax.training.signals.Models`."""

    config: RunConfig
    embedder: Embedder
    reader: Generator | None  # None: no generator is loaded

    @property
    def generator(self) -> Generator:
        assert self.reader is not None  # phases that read answers have one
        return self.reader

    @property
    def variables(self) -> ModelVariables:
        reads = {} if self.reader is None else {"generator": self.reader.variables}
        return {"embedder": self.embedder.variables, **reads}


def shaped_models(config: RunConfig, with_generator: bool) -> ShapedModels:
    """The models that `ragjax.train` would load, as they would lie.

    Raises:
      UserError: a model whose config.json is nowhere to be had, or cannot be used.
    """
    return ShapedModels(config, _embedder(config), _generator(config) if with_generator else None)


@functools.cache  # several configurations are tried out on the same files
def _settings(name: str) -> tuple[ModelSource, Settings]:
    source = resolve_settings(name)
    return source, read_config(source)


def _embedder(config: RunConfig) -> Embedder:
    source, settings = _settings(config.embedder)
    module = encoder_of(settings, config.dtype)
    shape = module.config
    own = read_embedder_settings(source, shape.longest_input, config.query_prefix, config.passage_prefix)
    params, tokenizer = abstract_variables(module)["params"], _tokenizer(config.embedder, shape.vocab_size)
    return Embedder(source, shape, tokenizer, module, params, own.max_seq_length, own.prefixes)


def _generator(config: RunConfig) -> Generator:
    source, settings = _settings(config.generator)
    shape = DecoderConfig.from_hf(
        settings,
        dtype=config.dtype,
        lora=lora_of(config),
        quantize=None if config.quantize == "none" else config.quantize,
        scan_layers=config.scan_layers,
        remat=config.remat,
    )
    module = Decoder(shape)
    variables = abstract_variables(module)
    params = _stored_as(variables["params"], config.dtype if config.lora_rank else "float32")
    tokenizer = _tokenizer(config.generator, shape.vocab_size)
    eos = 0 if tokenizer is None else tokenizer.eos_token_id
    return Generator(source, shape, tokenizer, module, params, eos, (eos,), variables.get(COLLECTION))


def _stored_as(params: Tree, dtype: str) -> Tree:
    """The parameters' shapes in the dtype that they are loaded in; a quantised kernel stays what it is."""

    def stored(path, leaf):
        is_quantised = path[-1].key in ("codes", "absmax")
        return leaf if is_quantised else jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype))

    return jax.tree_util.tree_map_with_path(stored, params)


@functools.cache
def _tokenizer(name: str, vocab_size: int) -> Any:
    """A model's tokenizer, None where its folder has none."""
    source, settings = _settings(name)
    if source.format != "gguf" and not any((source.path / file).is_file() for file in _TOKENIZERS):
        return None
    return load_tokenizer(source, {**settings, "vocab_size": vocab_size})
