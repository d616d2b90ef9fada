"""From a model's name to its files, settings, parameters and tokenizer. Table of contents of the room."""

from ragjax.weights.load import load_params, read_config
from ragjax.weights.resolve import ModelSource, resolve_model, resolve_settings
from ragjax.weights.sentence_folder import EmbedderSettings, Prefixes, read_embedder_settings
from ragjax.weights.sharding import axes_of
from ragjax.weights.tokenizer import load_tokenizer

__all__ = [
    "EmbedderSettings",
    "ModelSource",
    "Prefixes",
    "axes_of",
    "load_params",
    "load_tokenizer",
    "read_config",
    "read_embedder_settings",
    "resolve_model",
    "resolve_settings",
]
