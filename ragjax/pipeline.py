"""The whole pipeline: question -> vector -> passages -> prompt -> answer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ragjax.config import RunConfig
from ragjax.costs import Cost, forward_flops
from ragjax.data.prompts import PromptBuilder
from ragjax.data.questions import Passage
from ragjax.data.sources import Dataset
from ragjax.errors import UserError
from ragjax.files import default_cache_dir
from ragjax.models.lora import COLLECTION, LoraConfig
from ragjax.pretrained import Embedder, Generator, init_lora, load_embedder, load_generator
from ragjax.retrieval import (
    ArrayVectors,
    EncodedCorpus,
    ExactIndex,
    Index,
    PassageList,
    PassageStore,
    Queries,
    Retrieval,
    Retriever,
    encode_corpus,
)

Tree = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """An embedder, a retriever over one corpus, and a generator."""

    embedder: Embedder
    generator: Generator
    store: PassageStore
    retriever: Retriever
    prompts: PromptBuilder
    encode_cost: Cost  # of the passage vectors, also where an earlier run computed them

    def check_top_k(self, top_k: int) -> None:
        """Raises UserError where there are fewer passages than would be read."""
        if top_k > len(self.store):
            raise UserError(f"--top_k={top_k} is more than the {len(self.store)} passages: lower it.")

    def retrieve(self, questions: Sequence[str], k: int) -> Retrieval:
        """The k nearest passages of each question."""
        return self.retriever.retrieve(Queries(questions, self.embedder.encode(questions)), k)

    def passages(self, rows: Sequence[int]) -> list[Passage]:
        return [self.store[int(row)] for row in rows]

    def decoding_prompts(
        self, question: str, rows: Sequence[int], scores: np.ndarray, config: RunConfig
    ) -> tuple[list[list[int]], np.ndarray]:
        """What an answer is decoded from: prompt ids [K] and their log p(z|x) [K], K = 1 for concatenated passages.

        rows, scores [k]: the passages read, best first.

        Raises:
          UserError: the question leaves no room for passages in the generator's window.
        """
        groups = [self.passages(rows)] if config.decode == "concat" else [[self.store[int(row)]] for row in rows]
        prompts = [self.prompts.prompt(group, question, reserve=config.max_new_tokens) for group in groups]
        weights = np.zeros(1) if config.decode == "concat" else log_probabilities(scores, config.score_scale)
        return prompts, weights

    def prediction(self, new_tokens: Sequence[int]) -> str:
        """The answer in generated tokens: the first line of their text."""
        return first_line(self.generator.decode(new_tokens))

    def with_trained(self, trained: Mapping[str, Mapping[str, Tree]]) -> "Pipeline":
        """The same pipeline with trained collections, {"embedder" | "generator": {"params" | "lora": tree}}."""
        embedder, generator = (
            dataclasses.replace(model, **trained.get(name, {}))
            for name, model in (("embedder", self.embedder), ("generator", self.generator))
        )
        return dataclasses.replace(self, embedder=embedder, generator=generator)


def first_line(text: str) -> str:
    """The first line of an answer, stripped."""
    return next(iter(text.strip().splitlines()), "").strip()


def probabilities(scores: np.ndarray, scale: float) -> np.ndarray:
    """p(z|x) = softmax(scale * score) over the last axis."""
    return np.exp(log_probabilities(scores, scale))


def log_probabilities(scores: np.ndarray, scale: float) -> np.ndarray:
    """log p(z|x), finite also where p(z|x) is too small for a float64."""
    logits = scale * np.asarray(scores, np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def load_models(config: RunConfig) -> tuple[Embedder, Generator]:
    """The untrained models of a run. Weights that will be trained are float32, frozen ones have the run's dtype."""
    lora = None
    if config.lora_rank:
        lora = LoraConfig(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_target_names)
    generator = load_generator(
        config.generator,
        config.dtype,
        None if config.quantize == "none" else config.quantize,
        param_dtype=config.dtype if lora else "float32",
        lora=lora,
        scan_layers=config.scan_layers,
        remat=config.remat,
    )
    if lora:
        # B starts at zero, so fresh adapters leave the model as it is.
        generator = dataclasses.replace(generator, lora=init_lora(generator, config.seed))
    return load_embedder(config.embedder, config.dtype), generator


def build_pipeline(
    config: RunConfig, dataset: Dataset, embedder: Embedder, generator: Generator, show_progress: bool = True
) -> Pipeline:
    """Encodes the corpus (or finds its vectors in the cache) and puts the pipeline together.

    Raises:
      UserError: --top_k is larger than the corpus, or the vectors cannot be stored.
    """
    if config.top_k > len(dataset.passages):
        raise UserError(
            f"--top_k={config.top_k} is more than the {len(dataset.passages)} passages of {dataset.name}: lower it."
        )
    store = PassageList(dataset.passages)
    encoded = encode_corpus(
        embedder.encode,
        store,
        embedder.key,
        default_cache_dir() / "vectors",
        embedder.config.hidden_size,
        show_progress,
        count_tokens=lambda texts: sum(map(len, embedder.tokenize(texts))),
    )
    prompts = PromptBuilder(
        generator.tokenizer,
        generator.eos_token_id,
        config.max_passage_tokens,
        generator.config.max_position_embeddings,
        config.prompt,
        generator.config.vocab_size,
    )
    cost = _encode_cost(embedder, encoded, len(store))
    vectors = np.asarray(encoded.vectors)
    retriever = Retriever(build_index(vectors), ArrayVectors(vectors))
    return Pipeline(embedder, generator, store, retriever, prompts, cost)


def build_index(vectors: np.ndarray) -> Index:
    """The index over passage vectors [P, E]. This is where its type is chosen."""
    return ExactIndex(vectors)


def _encode_cost(embedder: Embedder, encoded: EncodedCorpus, passages: int) -> Cost:
    """FLOPs from the token count, every passage taken at the mean length (attention is a few percent here)."""
    lengths = [encoded.tokens / passages] * passages
    return Cost(encoded.seconds, forward_flops(embedder.size, lengths, 0), encoded.tokens)


def trained_collection(config: RunConfig) -> str:
    """Which collection of the generator is trained."""
    return COLLECTION if config.lora_rank else "params"
