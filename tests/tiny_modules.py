"""Tiny random models as modules and variables, and batches for them: no files, no tokenizer.

Every parameter is random, norms, biases and both halves of an adapter included.
"""

import functools
from typing import Any

import jax
import numpy as np

from ragjax.data.batches import Batch, Example, Shape, make_batch
from ragjax.models.bert import Bert, BertConfig
from ragjax.models.decoder import Decoder
from ragjax.models.decoder_config import DecoderConfig
from ragjax.models.mpnet import MPNet, MPNetConfig
from ragjax.training.objectives import AnswerMixture, AnswerObjective, ConcatenatedObjective, Objective

DECODER = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
BERT = {
    "vocab_size": 53,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
MPNET = {
    "vocab_size": 53,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 302,
    "layer_norm_eps": 1e-5,
}
PASSAGES = 3
EMBEDDING = BERT["hidden_size"]


def tiny_decoder(seed: int = 0, **overrides: Any) -> tuple[Decoder, dict[str, Any]]:
    module = Decoder(DecoderConfig(**DECODER | overrides))
    return module, random_variables(module, seed, method="full_logits")


def tiny_bert(seed: int = 0, **overrides: Any) -> tuple[Bert, dict[str, Any]]:
    module = Bert(BertConfig(**BERT | overrides))
    return module, random_variables(module, seed)


def tiny_mpnet(seed: int = 0, **overrides: Any) -> tuple[MPNet, dict[str, Any]]:
    module = MPNet(MPNetConfig(**MPNET | overrides))
    return module, random_variables(module, seed)


def random_variables(module: Any, seed: int, method: str | None = None) -> dict[str, Any]:
    """All collections of a module: normal numbers of deviation 0.2, around 1 for norm weights and 0 for all else."""
    inputs = [jax.ShapeDtypeStruct((1, 1), np.int32)] * 3
    shapes = jax.eval_shape(functools.partial(module.init, method=method), jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def random_examples(count: int, seed: int = 0, passages: int = PASSAGES, end: int = 2) -> list[Example]:
    """Questions with prompts of 4 to 14 tokens and answers of 1 to 4 tokens, the end token included."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        vectors = rng.normal(size=(passages, EMBEDDING))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        prompts = [rng.integers(3, 61, rng.integers(4, 15)).tolist() for _ in range(passages)]
        answer = [*rng.integers(3, 61, index % 4).tolist(), end]
        examples.append(Example(index, rng.integers(3, 53, rng.integers(3, 9)).tolist(), vectors, prompts, answer))
    return examples


def stacked_batch(examples: list[Example], devices: int, accumulation: int, shape: Shape) -> Batch:
    """[devices, micro-batches, ...], questions split evenly in order; what is left over is filler."""
    size = -(-len(examples) // (devices * accumulation))
    groups = []
    for g in range(devices * accumulation):
        chosen = examples[g * size : (g + 1) * size]
        group = make_batch(chosen or examples[:1], shape, size, 8)
        groups.append(group if chosen else jax.tree.map(np.zeros_like, group))
    return jax.tree.map(lambda *leaves: np.stack(leaves).reshape(devices, accumulation, *leaves[0].shape), *groups)


def tiny_objective(name: str, dropout: bool = False, **decoder: Any) -> tuple[Objective, dict[str, Any]]:
    """An objective over random models, and their variables {"embedder", "generator"}."""
    embedder, embedder_variables = tiny_bert(1)
    generator, generator_variables = tiny_decoder(2, **decoder)
    if name == "concat_nll":
        objective = ConcatenatedObjective(generator, dropout)
    else:
        objective = AnswerObjective(embedder, generator, AnswerMixture(name, score_scale=5.0), dropout)
    return objective, {"embedder": embedder_variables, "generator": generator_variables}
