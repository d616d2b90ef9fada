"""What reads a question and a passage together: a cross-encoder, or the generator that is asked for the question.

Notable choices
- A cross-encoder gives its logit: the sigmoid that sentence-transformers puts behind one changes no order.
- The generator's score is the mean log-likelihood of the question's tokens after the passage and an instruction, as in
  Sachan et al. 2022 (arXiv 2204.07496). It is the untrained generator, so that a score holds for the whole run.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float32, Int

from ragjax.arrays import AnyArray, Array, Tree, Variables
from ragjax.costs import Cost, ModelSize, forward_flops
from ragjax.data.batches import LikeBatch, like_batches, pad_tokens
from ragjax.data.questions import Passage
from ragjax.errors import UserError
from ragjax.files import read_settings
from ragjax.models.encoders import EncoderConfig
from ragjax.models.rankers import Ranker
from ragjax.parallel import REPLICATED
from ragjax.pretrained import ENCODERS, Generator
from ragjax.settings import Settings
from ragjax.voice import progress
from ragjax.weights import ModelSource, load_params, load_tokenizer, read_config, resolve_model
from ragjax.weights.tables import RANKER_TABLES

_TOKENS = 4096  # of the pairs that are scored at once, padding included
_SHORTEST = 8  # tokens of a pair below which no limit can be meant
# Pairs above which scoring takes long enough to show how far it is.
_SHOWN = 64
_INSTRUCTION = "\nPlease write a question based on this passage.\nQuestion:"


@dataclasses.dataclass(frozen=True)
class CrossEncoder:
    """An encoder that reads question and passage as one text and gives a score."""

    source: ModelSource
    config: EncoderConfig
    tokenizer: Any
    module: nn.Module
    params: Tree
    max_seq_length: int  # tokens of a pair, specials included; the longer of the two texts is cut

    def score(self, questions: Sequence[str], passages: Sequence[Passage]) -> tuple[Float32[np.ndarray, " n"], Cost]:
        """The logits of n pairs; pairs of like length run together."""
        began = time.perf_counter()
        pairs = self._read(questions, [passage.embedder_text for passage in passages])
        lengths = [len(tokens) for tokens, _ in pairs]
        batches = like_batches(lengths, self.max_seq_length, lambda length: max(_TOKENS // length, 1))
        scores = np.empty(len(pairs), np.float32)
        with progress(total=len(pairs), desc="re-ranking", unit=" pairs", shown=len(pairs) > _SHOWN) as bar:
            for batch in batches:
                scores[batch.chosen] = self._scores([pairs[i] for i in batch.chosen], batch)
                bar.update(len(batch.chosen))
        return scores, Cost(time.perf_counter() - began, forward_flops(self.size, lengths, 0), sum(lengths))

    def _read(self, questions: Sequence[str], texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Tokens and token types of pairs."""
        if not texts:
            return []
        cut = {"truncation": "longest_first", "max_length": self.max_seq_length, "return_token_type_ids": True}
        read = self.tokenizer(list(questions), list(texts), **cut)
        return list(zip(read["input_ids"], read["token_type_ids"], strict=True))

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]], batch: LikeBatch) -> np.ndarray:
        tokens, lengths = pad_tokens([tokens for tokens, _ in pairs], batch.rows, batch.length)
        types, _ = pad_tokens([types for _, types in pairs], batch.rows, batch.length)
        return np.asarray(_rank(self.module, {"params": self.params}, tokens, lengths, types))[: len(pairs)]

    @property
    def size(self) -> ModelSize:
        """What the formulas of costs need to know."""
        weights = sum(leaf.size for leaf in jax.tree.leaves(self.params["backbone"]["encoder"]["layer"]))
        return ModelSize(weights, 0, 0, self.config.num_hidden_layers, self.config.hidden_size)

    def describe(self) -> dict[str, Any]:
        """What a run records of it."""
        settings = {"max_seq_length": self.max_seq_length, "dtype": self.config.dtype}
        return {"type": "cross-encoder", "source": self.source.describe(), "sha256": self.source.sha256, **settings}


@functools.partial(jax.jit, static_argnames="module")
def _rank(
    module: nn.Module,
    variables: Variables,
    tokens: Int[AnyArray, "R S"],
    lengths: Int[AnyArray, " R"],
    types: Int[AnyArray, "R S"],
) -> Float32[Array, " R"]:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    real = positions < lengths[:, None]
    return module.bind(variables)(tokens, real.astype(jnp.int32), positions, types)


def find_cross_encoder(name_or_dir: str | Path) -> ModelSource:
    """Where a cross-encoder's files are. Raises UserError, naming the flag, where they cannot be found."""
    try:
        return resolve_model(name_or_dir)
    except UserError as error:
        if Path(name_or_dir).expanduser().exists():
            raise  # says what is wrong with it
        raise UserError(
            f"--rerank={name_or_dir} is no folder, and no cross-encoder that the hub or its cache could give: give a "
            "folder, a hub id such as cross-encoder/ms-marco-MiniLM-L6-v2, or `generator`"
        ) from error


def load_cross_encoder(name_or_dir: str | Path, dtype: str = "float32") -> CrossEncoder:
    """A cross-encoder by hub id or local folder, as sentence-transformers keeps them.

    Args:
      name_or_dir: see `ragjax.weights.resolve_model`.
      dtype: of activations; its weights stay float32.

    Raises:
      UserError: it cannot be found, is damaged, of an unsupported kind, or gives more than one score.
    """
    source = find_cross_encoder(name_or_dir)
    settings = read_config(source)
    model_type = settings["model_type"]
    if model_type not in ENCODERS:
        raise UserError(
            f"{settings.where} has model_type = {model_type!r}, which is no cross-encoder that this version reads "
            f"({', '.join(ENCODERS)}): choose another --rerank"
        )
    _check_labels(settings)
    config_type, encoder = ENCODERS[model_type]
    config = config_type.from_hf(settings, dtype=dtype)
    module = Ranker(config, encoder)
    inputs = [jax.ShapeDtypeStruct((1, 1), jnp.int32)] * 4
    abstract = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    tokenizer = load_tokenizer(source, settings | {"vocab_size": config.vocab_size})
    params = load_params(source, abstract, "float32", place=REPLICATED.load, table=RANKER_TABLES[model_type])
    longest, tokenizer.truncation_side = _read_cutting(source, config.longest_input)
    return CrossEncoder(source, config, tokenizer, module, params, longest)


def _check_labels(settings: Settings) -> None:
    """Refuses what is no cross-encoder, or has several labels; transformers takes two where none is named."""
    labels = settings.section("id2label")
    count = len(labels) if labels else settings.get("num_labels") or 2
    if count != 1:
        raise UserError(
            f"{settings.where} describes {count} labels where a re-ranker gives one score: give --rerank a "
            "cross-encoder such as cross-encoder/ms-marco-MiniLM-L6-v2, or `generator`"
        )


def _read_cutting(source: ModelSource, longest: int) -> tuple[int, str]:
    """(tokens that a pair may have, the side on which a text is cut), as sentence-transformers 2 to 6 write them.

    Raises UserError for a prompt, which would stand in front of the question.
    """
    names = ("sentence_bert_config.json", "tokenizer_config.json", "config_sentence_transformers.json")
    encoder, tokenizer, library = (read_settings(source.path / name) for name in names)
    if library.get("default_prompt_name") is not None:
        raise library.fault("default_prompt_name", ", which is not supported for --rerank: set it to null")
    given = ((encoder, "max_seq_length"), (tokenizer, "model_max_length"))
    limits = [int(settings.number(key, least=_SHORTEST)) for settings, key in given if settings.get(key) is not None]
    return min([longest, *limits]), tokenizer.text("truncation_side") or "right"


@dataclasses.dataclass(frozen=True)
class QuestionLikelihood:
    """How likely a generator finds the question after the passage."""

    generator: Generator
    max_passage_tokens: int

    def score(self, questions: Sequence[str], passages: Sequence[Passage]) -> tuple[Float32[np.ndarray, " n"], Cost]:
        """Mean log p(question token | passage, earlier question tokens) of n pairs, natural log.

        Raises UserError for a question that leaves no room for a passage.
        """
        began = time.perf_counter()
        asked = [self._ids(f" {question}") for question in questions]
        prompts = [self._prompt(passage, len(ids)) for passage, ids in zip(passages, asked, strict=True)]
        groups = [range(start, min(start + _SHOWN, len(asked))) for start in range(0, len(asked), _SHOWN)]
        scores = np.empty(len(asked), np.float32)
        for group in progress(groups, desc="re-ranking", unit="batch", shown=len(groups) > 1):
            found = self.generator.score_tokens([prompts[i] for i in group], [asked[i] for i in group])
            scores[list(group)] = [values.mean() for values in found]
        lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, asked, strict=True)]
        flops = forward_flops(self.generator.size, lengths, sum(map(len, asked)))
        return scores, Cost(time.perf_counter() - began, flops, sum(lengths))

    def _prompt(self, passage: Passage, reserved: int) -> list[int]:
        """Passage: ... Please write a question based on this passage. Question:"""
        start, end = self.generator.prompt_ids("Passage:"), self._ids(_INSTRUCTION)
        room = self.generator.config.max_position_embeddings - len(start) - len(end) - reserved
        if room < 1:
            raise UserError("a question is too long for --rerank=generator: shorten it, or leave --rerank out.")
        text = self._ids(f" {passage.embedder_text}")
        return [*start, *text[: min(self.max_passage_tokens, room)], *end]

    def _ids(self, text: str) -> list[int]:
        return self.generator.tokenizer(text, add_special_tokens=False)["input_ids"]

    def describe(self) -> dict[str, Any]:
        """What a run records of it."""
        source = {"source": self.generator.describe(), "sha256": self.generator.source.sha256}
        return {"type": "generator", **source, "max_passage_tokens": self.max_passage_tokens}
