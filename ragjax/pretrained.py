"""Pretrained models, ready to use: an embedder (texts -> vectors) and a generator (prompts -> answers)."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float32, Int

from ragjax.arrays import Array, Ids, Tree, Variables
from ragjax.checkpoints import tree_sha256
from ragjax.config import QUANTIZE, DecodeConfig
from ragjax.costs import ModelSize
from ragjax.data.batches import Shape, length_bucket, make_rows, round_up
from ragjax.data.pieces import Pieces
from ragjax.data.prompts import default_prefix
from ragjax.embedding import embed_all
from ragjax.errors import UserError
from ragjax.generation import Prepared, prepare
from ragjax.models.bert import Bert, BertConfig
from ragjax.models.decoder import Decoder
from ragjax.models.decoder_config import DecoderConfig
from ragjax.models.encoders import EncoderConfig
from ragjax.models.lora import COLLECTION, LoraConfig, is_fresh
from ragjax.models.mpnet import MPNet, MPNetConfig
from ragjax.parallel import REPLICATED, Arrangement, device_count, lies_here, to_host
from ragjax.scoring import score_answers
from ragjax.settings import Settings
from ragjax.voice import progress, warn
from ragjax.weights import (
    ModelSource,
    Prefixes,
    load_params,
    load_tokenizer,
    read_config,
    read_embedder_settings,
    resolve_model,
)
from ragjax.weights.wordpiece import lower_case_first

# Rows scored or decoded at once where a caller gives whole lists.
_ROWS = 8
# Settings of how layers are compiled: they change no value beyond rounding.
_COMPILATION = ("scan_layers", "remat", "decoding_layout")


def _refuse_one_text(texts: Sequence[str]) -> None:
    if isinstance(texts, str):  # would be read letter by letter
        raise TypeError("texts are given as a list of strings: put a single one into a list")


@dataclasses.dataclass(frozen=True)
class Embedder:
    """A sentence encoder: texts -> unit vectors.

    Questions and passages may get different prefixes, so each side has its own methods.
    """

    source: ModelSource
    config: EncoderConfig
    tokenizer: Any
    module: nn.Module
    params: Tree
    max_seq_length: int  # tokens of a text, prefix and specials included; the rest is cut
    prefixes: Prefixes = Prefixes()

    @property
    def variables(self) -> dict[str, Tree]:
        """Of the module: {collection: parameters}."""
        return {"params": self.params}

    @functools.cached_property
    def passage_record(self) -> dict[str, Any]:
        """Everything that shapes this embedder's vectors of passages, trained weights included, as it is stored beside
        them.
        """
        return {
            "sha256": self.source.sha256,
            "weights": tree_sha256(self.params),
            "max_seq_length": self.max_seq_length,
            "dtype": str(self.config.dtype),
            "passage_prefix": self.prefixes.passage,
        }

    @property
    def passage_key(self) -> str:
        """The same as one text."""
        sha256, weights, length, dtype, prefix = self.passage_record.values()
        return f"{sha256} {weights} max_seq_length={length} dtype={dtype} prefix={prefix!r}"

    @property
    def key(self) -> str:
        """The same for questions and passages together."""
        return f"{self.passage_key} query_prefix={self.prefixes.query!r}"

    @property
    def width(self) -> int:
        """E, of its vectors."""
        return self.config.hidden_size

    def describe(self) -> str:
        """One line: the source, and what stands in front of questions and passages."""
        sides = {"questions": self.prefixes.query, "passages": self.prefixes.passage}
        prefixed = [f"{side} after {prefix!r}" for side, prefix in sides.items() if prefix]
        return ", ".join([self.source.describe(), *prefixed])

    @property
    def size(self) -> ModelSize:
        """What the formulas of costs need to know."""
        config = self.config
        weights = sum(leaf.size for leaf in jax.tree.leaves(self.params["encoder"]["layer"]))
        return ModelSize(weights, 0, 0, config.num_hidden_layers, config.hidden_size)

    def query_tokens(self, questions: Sequence[str]) -> list[list[int]]:
        """Token ids of questions after their prefix, with the tokenizer's specials, at most `max_seq_length` each."""
        return self._tokens(questions, self.prefixes.query)

    def passage_tokens(self, passages: Sequence[str]) -> list[list[int]]:
        """The same of passages."""
        return self._tokens(passages, self.prefixes.passage)

    def _tokens(self, texts: Sequence[str], prefix: str) -> list[list[int]]:
        _refuse_one_text(texts)
        if not texts:
            return []
        texts = [prefix + text for text in texts]
        return self.tokenizer(texts, truncation=True, max_length=self.max_seq_length)["input_ids"]

    def encode_queries(
        self, questions: Sequence[str], batch_size: int = 64, show_progress: bool = False
    ) -> Float32[np.ndarray, "n E"]:
        """Unit vectors of n questions, in their order, whatever the batch size."""
        return self.encode_tokens(self.query_tokens(questions), batch_size, show_progress)

    def encode_passages(
        self, passages: Sequence[str], batch_size: int = 64, show_progress: bool = False
    ) -> Float32[np.ndarray, "n E"]:
        """Unit vectors of n passages, in their order, whatever the batch size."""
        return self.encode_tokens(self.passage_tokens(passages), batch_size, show_progress)

    def encode(
        self, texts: Sequence[str], batch_size: int = 64, show_progress: bool = False
    ) -> Float32[np.ndarray, "n E"]:
        """Unit vectors of n texts that are neither: after the model's default prompt, if it has one."""
        return self.encode_tokens(self._tokens(texts, self.prefixes.default), batch_size, show_progress)

    def encode_tokens(
        self,
        tokens: Sequence[Ids],
        batch_size: int = 64,
        show_progress: bool = False,
        advance: Callable[[int], object] | None = None,
    ) -> Float32[np.ndarray, "n E"]:
        """Vectors of texts that are tokenised already; equal lengths share a batch, so little is padding.

        All local devices share the work: `batch_size` texts of a batch go to each.  advance: is told of every few texts
        that are done.
        """
        with progress(total=len(tokens), desc="encoding", unit=" texts", shown=show_progress) as bar:
            return embed_all(
                self.module,
                self._placed,
                tokens,
                width=self.width,
                longest=self.max_seq_length,
                batch_size=batch_size,
                advance=advance or bar.update,
            )

    @functools.cached_property
    def _placed(self) -> Variables:
        """The variables on every device here; those of other processes are fetched, for which all have to come here."""
        variables = self.variables
        if not all(map(lies_here, jax.tree.leaves(variables))):
            variables = to_host(variables)
        return REPLICATED.place(variables) if device_count() > 1 else REPLICATED.keep(variables)


@dataclasses.dataclass(frozen=True)
class Generator:
    """A decoder-only language model with its tokenizer; `lora` holds adapters where there are any."""

    source: ModelSource
    config: DecoderConfig
    tokenizer: Any
    module: Decoder
    params: Tree
    eos_token_id: int  # ends a training answer
    end_ids: tuple[int, ...]  # any of them ends a generated one
    lora: Tree | None = None

    @property
    def variables(self) -> dict[str, Tree]:
        """Of the module: {collection: parameters}, adapters included."""
        return {"params": self.params} | ({} if self.lora is None else {COLLECTION: self.lora})

    def describe(self) -> str:
        """One line: the source, and how the layers are stored where that is in fewer bits."""
        stored = f", layers stored as {self.config.quantize}" if self.config.quantize else ""
        return self.source.describe() + stored

    @functools.cached_property
    def key(self) -> str:
        """Names everything that decides this generator's probabilities, adapters and trained weights included."""
        shape = {name: v for name, v in dataclasses.asdict(self.config).items() if name not in _COMPILATION}
        # Without adapters all weights may have been trained; with them the base is the source's.
        if self.lora is None:
            trained = tree_sha256(self.params)
        else:  # fresh ones change no probability, whatever seed has drawn them
            trained = "fresh adapters" if is_fresh(self.lora) else tree_sha256(self.lora)
        dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(self.params)})
        parts = [self.source.sha256, json.dumps(shape, sort_keys=True, default=str), *dtypes, trained]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @functools.cached_property
    def size(self) -> ModelSize:
        """What the formulas of costs need to know."""
        config = self.config
        layers = abstract_decoder(config)["params"]["layers"]
        lora = 0 if self.lora is None else sum(leaf.size for leaf in jax.tree.leaves(self.lora))
        return ModelSize(
            layer_weights=sum(leaf.size for leaf in jax.tree.leaves(layers)),
            head_weights=config.vocab_size * config.hidden_size,
            lora_weights=lora,
            layers=config.num_hidden_layers,
            attention_width=config.num_attention_heads * config.head_dim,
        )

    def logits(
        self, token_ids: Int[np.ndarray, "B S"], lengths: Int[np.ndarray, " B"] | None = None
    ) -> Float32[Array, "B S V"]:
        """Logits at every position of right-padded token_ids: the plain reference path.

        lengths: real tokens of each row; all by default. Later positions are meaningless.
        """
        tokens = jnp.asarray(token_ids, jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        ends = jnp.full(len(tokens), tokens.shape[1]) if lengths is None else jnp.asarray(lengths)
        segments = (positions < ends[:, None]).astype(jnp.int32)
        return _full_logits(self.module, self.variables, tokens, segments, positions)

    def answer_log_probs(self, prompts: Sequence[str], answers: Sequence[str]) -> list[np.ndarray]:
        """log p(answer token | prompt, earlier answer tokens), natural log: one array [T_i] per pair, end token last.

        Prompts take the tokenizer's default encoding; an answer is tokenised alone, without special tokens.
        """
        _refuse_one_text(prompts)
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts but {len(answers)} answers")
        return self.score_tokens(
            [self.prompt_ids(prompt) for prompt in prompts], [self.answer_ids(answer) for answer in answers]
        )

    def score_tokens(self, prompt_ids: Sequence[Ids], answer_ids: Sequence[Ids]) -> list[np.ndarray]:
        """`answer_log_probs` of prompts and answers given as ids; pairs of like length run together."""
        results: list[np.ndarray] = [np.empty(0, np.float32)] * len(prompt_ids)
        order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]) + len(answer_ids[i]))
        for start in range(0, len(order), _ROWS):
            chosen = order[start : start + _ROWS]
            longest = max(len(prompt_ids[i]) + len(answer_ids[i]) for i in chosen)
            shape = Shape(_ROWS, length_bucket(longest), round_up(max(len(answer_ids[i]) for i in chosen), 8))
            rows = make_rows([[prompt_ids[i]] for i in chosen], [answer_ids[i] for i in chosen], chosen, shape, _ROWS)
            scores = to_host(_score(self.module, self.variables, rows))[:, 0]
            for row, i in enumerate(chosen):
                results[i] = scores[row, : len(answer_ids[i])]
        return results

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 24) -> list[str]:
        """Greedy answers: the text up to the first end token, at most `max_new_tokens` tokens."""
        _refuse_one_text(prompts)
        new = self.generate_tokens([self.prompt_ids(prompt) for prompt in prompts], max_new_tokens)
        return [self.decode(ids) for ids in new]

    def generate_tokens(self, prompts: Sequence[Ids], max_new_tokens: int, batch_size: int = _ROWS) -> list[list[int]]:
        """Greedy new tokens of prompts given as ids, the end token left out; prompts of like length run together."""
        greedy = DecodeConfig(max_new_tokens=max_new_tokens)
        answers = self.prepared().decode_answers(
            [[ids] for ids in prompts], np.zeros((len(prompts), 1)), greedy, batch_size
        )
        return [answer.tokens for answer in answers]

    def prepared(self, arrangement: Arrangement | None = None) -> Prepared:
        """What decodes answers; on CPU it holds a copy of the layers, so let it go when you have them.

        arrangement: of the devices that share the questions out; None: the weights are used where they lie.
        """
        return prepare(self, arrangement)

    def prompt_ids(self, prompt: str) -> list[int]:
        """The tokenizer's default prefix and the prompt, whose special-token strings are plain text."""
        return [
            *default_prefix(self.tokenizer),
            *self.tokenizer(prompt, add_special_tokens=False)["input_ids"],
        ]

    def answer_ids(self, answer: str) -> list[int]:
        """The answer alone, as it stands behind a line break, then one end token."""
        return [*self._pieces.inner(answer), self.eos_token_id]

    @functools.cached_property
    def _pieces(self) -> Pieces:
        return Pieces(self.tokenizer)

    def decode(self, ids: Ids) -> str:
        """Text of generated ids, special tokens removed."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@functools.partial(jax.jit, static_argnames="module")
def _full_logits(
    module: Decoder,
    variables: Variables,
    tokens: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    positions: Int[Array, "B S"],
) -> Float32[Array, "B S V"]:
    return module.bind(variables).full_logits(tokens, segments, positions)


_score = jax.jit(score_answers, static_argnames="module")


# config.json's model_type -> the settings and the module of its encoder.
ENCODERS: dict[str, tuple[type[EncoderConfig], Callable[..., nn.Module]]] = {
    "bert": (BertConfig, Bert),
    "mpnet": (MPNetConfig, MPNet),
}


def load_embedder(
    name_or_dir: str | Path,
    dtype: str = "float32",
    *,
    query_prefix: str | None = None,
    passage_prefix: str | None = None,
) -> Embedder:
    """An embedder by short name, hub id or local folder.

    Args:
      name_or_dir: see `ragjax.weights.resolve_model`.
      dtype: of activations; its weights stay float32, because they are what is trained.
      query_prefix: what is put in front of questions; None: the model's own.
      passage_prefix: the same of passages.

    Raises:
      UserError: it cannot be found, is damaged, or is of an unsupported kind.
    """
    source = resolve_model(name_or_dir)
    hf_config = read_config(source)
    module = encoder_of(hf_config, dtype)
    config = module.config
    settings = read_embedder_settings(source, config.longest_input, query_prefix, passage_prefix)
    config = dataclasses.replace(config, pooling=settings.pooling)
    module = module.clone(config=config)
    tokenizer = load_tokenizer(source, hf_config | {"vocab_size": config.vocab_size})
    tokenizer.truncation_side = settings.truncation_side
    if settings.lower_case:
        lower_case_first(tokenizer.backend_tokenizer)
    params = load_params(source, abstract_variables(module)["params"], "float32", place=REPLICATED.load)
    for remark in settings.remarks:
        warn(remark)
    return Embedder(source, config, tokenizer, module, params, settings.max_seq_length, settings.prefixes)


def encoder_of(hf_config: Settings, dtype: str) -> nn.Module:
    """The sentence encoder that a config.json describes. Raises UserError where it describes no such model."""
    model_type = hf_config["model_type"]
    if model_type not in ENCODERS:
        raise UserError(
            f"{hf_config.where} has model_type = {model_type!r}, which is no sentence encoder that this version reads "
            f"({', '.join(ENCODERS)}): choose another embedder"
        )
    config_type, module_type = ENCODERS[model_type]
    return module_type(config_type.from_hf(hf_config, dtype=dtype))


def load_generator(
    name_or_dir: str | Path,
    dtype: str = "float32",
    quantize: str | None = None,
    *,
    param_dtype: str | None = None,
    lora: LoraConfig | None = None,
    scan_layers: bool = True,
    remat: str = "none",
    arrangement: Arrangement = REPLICATED,
) -> Generator:
    """A generator by short name, hub id, local folder or .gguf file.

    Args:
      name_or_dir: see `ragjax.weights.resolve_model`.
      dtype: of activations.
      quantize: None, or "int8" or "nf4" for the layers' kernels, which can then not be trained (adapters can).
      param_dtype: of the other weights, `dtype` by default.
      lora: shape of the adapters that the module carries. They are not initialised here: see `init_lora`.
      scan_layers: compile one layer and loop over all of them.
      remat: what is recomputed in a backward pass: "none", "partial" or "full".
      arrangement: of the devices, which says where the weights lie.

    Raises:
      UserError: it cannot be found, is damaged, or is of an unsupported kind, or cannot be shared out like that.
    """
    if quantize not in (None, *QUANTIZE):
        raise UserError(f"quantize={quantize!r} is not known: choose {' or '.join(QUANTIZE)}, or leave it out.")
    source = resolve_model(name_or_dir)
    hf_config = read_config(source)
    config = DecoderConfig.from_hf(
        hf_config, dtype=dtype, lora=lora, quantize=quantize, scan_layers=scan_layers, remat=remat
    )
    module = Decoder(config)
    tokenizer = load_tokenizer(source, hf_config | {"vocab_size": config.vocab_size})
    if tokenizer.eos_token_id is None:
        raise UserError(f"{hf_config.where} names no token that ends a text: set its eos_token_id.")
    abstract = abstract_decoder(config)["params"]
    arrangement.check(abstract, source.name)
    params = load_params(source, abstract, param_dtype or dtype, quantize, place=arrangement.load)
    end_ids = tuple(hf_config["end_token_ids"]) or (tokenizer.eos_token_id,)
    return Generator(source, config, tokenizer, module, params, tokenizer.eos_token_id, end_ids)


def init_lora(generator: Generator, seed: int) -> Tree:
    """Fresh adapters (A random, B zero) in float32 for a generator that was loaded with a `LoraConfig`."""
    inputs = [np.zeros((1, 1), np.int32)] * 3
    # Under jit the base weights that `init` also makes are dead code.
    init = jax.jit(lambda key: generator.module.init(key, *inputs)[COLLECTION])
    return init(jax.random.key(seed))


def abstract_variables(module: nn.Module) -> dict[str, Any]:
    """Shapes of the module's variables, the same ones for all who ask: not to be changed. Nothing is computed."""
    return _traced(module)  # ty: ignore[invalid-argument-type]  a frozen dataclass, so hashable


@functools.cache  # it takes seconds
def _traced(module: nn.Module) -> dict[str, Any]:
    inputs = [jax.ShapeDtypeStruct((1, 1), jnp.int32)] * 3
    method = "full_logits" if isinstance(module, Decoder) else None
    return jax.eval_shape(functools.partial(module.init, method=method), jax.random.key(0), *inputs)


def abstract_decoder(config: DecoderConfig) -> dict[str, Any]:
    """Shapes of a decoder's variables as files hold them: without adapters, every kernel in full."""
    return abstract_variables(Decoder(dataclasses.replace(config, lora=None, quantize=None)))
