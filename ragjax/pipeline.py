"""The whole pipeline: question -> vector -> passages -> prompt -> answer."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int

from ragjax.arrays import ModelVariables, Variables
from ragjax.config import RunConfig
from ragjax.costs import Cost, encoding_flops, forward_flops
from ragjax.data.dataset import Dataset
from ragjax.data.passages import PassageStore
from ragjax.data.prompts import Prompt, PromptBuilder
from ragjax.data.questions import Passage, Question
from ragjax.data.stored_tokens import StoredTokens
from ragjax.errors import UserError
from ragjax.files import default_cache_dir
from ragjax.models.lora import COLLECTION, LoraConfig
from ragjax.parallel import Arrangement, arrange, to_host
from ragjax.paths import located
from ragjax.pretrained import Embedder, Generator, init_lora, load_embedder, load_generator
from ragjax.reranking import QuestionLikelihood, load_cross_encoder
from ragjax.retrieval import (
    Bm25Index,
    DeviceIndex,
    ExactIndex,
    HybridIndex,
    Index,
    Queries,
    RerankedIndex,
    Reranker,
    Retrieval,
    Retriever,
    TwoHopIndex,
    VectorShards,
    VectorStore,
    cached_vectors,
    identity_of,
    open_index,
)
from ragjax.weights import axes_of


@dataclasses.dataclass(frozen=True)
class Reader:
    """What answers from passages: a generator and its prompts."""

    generator: Generator
    prompts: PromptBuilder


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """An embedder, a retriever over one corpus, and a generator that reads what it finds."""

    embedder: Embedder
    reader: Reader | None  # None: only retrieval is asked for
    store: PassageStore
    retriever: Retriever
    encode_cost: Cost  # of the passage vectors, also where an earlier run computed them
    is_encoded_anew: bool = False  # the vectors are the embedder's own, as it was trained (--refresh_passages)

    @property
    def generator(self) -> Generator:
        """Raises UserError where only retrieval was asked for."""
        return self._reader.generator

    @property
    def prompts(self) -> PromptBuilder:
        """The generator's. Raises UserError where only retrieval was asked for."""
        return self._reader.prompts

    @property
    def _reader(self) -> Reader:
        if self.reader is None:
            raise UserError("these models were loaded for retrieval alone: load them with their generator to answer.")
        return self.reader

    @property
    def variables(self) -> dict[str, Variables]:
        """Of the models that are there: {"embedder" | "generator": {collection: parameters}}."""
        reads = {} if self.reader is None else {"generator": self.reader.generator.variables}
        return {"embedder": self.embedder.variables, **reads}

    def check_top_k(self, top_k: int) -> None:
        """Raises UserError where there are fewer passages than would be read."""
        check_top_k(top_k, self.store)

    def check_room(self, question: Question, passages: int, reserve: int) -> None:
        """Raises UserError, naming the question, where a prompt with so many passages has no room for it.

        reserve: tokens of the answer.
        """
        try:
            self.prompts.room(question.question, passages, reserve)
        except UserError as error:
            raise UserError(f'the question with the id "{question.id}" is too long: {error}') from error

    def retrieve(self, questions: Sequence[str], k: int) -> Retrieval:
        """The k nearest passages of each question."""
        return self.retrieve_each(questions, [k])[k]

    def retrieve_each(self, questions: Sequence[str], counts: Iterable[int]) -> dict[int, Retrieval]:
        """The same for each k of `counts`."""
        return self.retriever.retrieve_each(Queries(questions, self.embedder.encode_queries(questions)), counts)

    def passages(self, passage_rows: Sequence[int] | Int[np.ndarray, " K"]) -> list[Passage]:
        return [self.store[int(row)] for row in passage_rows]

    def decoding_prompts(
        self,
        question: str,
        passage_rows: Sequence[int] | Int[np.ndarray, " k"],
        scores: Float[np.ndarray, " k"],
        config: RunConfig,
    ) -> tuple[list[Prompt], Float[np.ndarray, " K"]]:
        """What an answer is decoded from: prompts [K] and their log p(z|x) [K], K = 1 for concatenated passages.

        passage_rows, scores [k]: the passages read, best first.

        Raises:
          UserError: the question leaves no room for passages in the generator's window.
        """
        passages = self.passages(passage_rows)
        groups = [passages] if config.decode == "concat" else [[passage] for passage in passages]
        prompts = [self.prompts.prompt(group, question, reserve=config.max_new_tokens) for group in groups]
        weights = np.zeros(1) if config.decode == "concat" else log_probabilities(scores, config.score_scale)
        return prompts, weights

    def prediction(self, new_tokens: Sequence[int]) -> str:
        """The answer in generated tokens: the first line of their text."""
        return first_line(self.generator.decode(new_tokens))

    def with_trained(self, trained: ModelVariables) -> "Pipeline":
        """The same pipeline with trained collections, {"embedder" | "generator": {"params" | "lora": tree}}."""
        embedder, reader = dataclasses.replace(self.embedder, **trained.get("embedder", {})), self.reader
        if reader is not None:
            generator = dataclasses.replace(reader.generator, **trained.get("generator", {}))
            reader = dataclasses.replace(reader, generator=generator)
        return dataclasses.replace(self, embedder=embedder, reader=reader)

    def over(self, vectors: VectorStore, config: RunConfig) -> "Pipeline":
        """The same pipeline with other vectors of its passages, all of which are compared on the host."""
        generator = None if self.reader is None else self.reader.generator
        index = build_index(config, vectors, ExactIndex(vectors), self.store, self.embedder, generator)
        return dataclasses.replace(self, retriever=dataclasses.replace(self.retriever, index=index, vectors=vectors))

    def encoded_anew(self, config: RunConfig, show_progress: bool = True) -> "Pipeline":
        """The same pipeline over vectors that its embedder as it is makes of the passages, or made for an earlier one.

        Raises:
          UserError: they cannot be stored.
        """
        # One process encodes, and the others wait: weights that lie over all of them are fetched before.
        embedder = dataclasses.replace(self.embedder, params=to_host(self.embedder.params))
        vectors = cached_vectors(embedder, self.store, default_cache_dir() / "vectors", show_progress)
        searched = self.over(vectors, config)
        return dataclasses.replace(searched, encode_cost=_encode_cost(embedder, vectors), is_encoded_anew=True)


def check_top_k(top_k: int, store: PassageStore) -> None:
    """Raises UserError where there are fewer passages than would be read."""
    if top_k > len(store):
        raise UserError(f"--top_k={top_k} is more than the {len(store)} passages: lower it.")


def first_line(text: str) -> str:
    """The first line of an answer, stripped."""
    return next(iter(text.strip().splitlines()), "").strip()


def probabilities(scores: Float[np.ndarray, "*B k"], scale: float) -> Float[np.ndarray, "*B k"]:
    """p(z|x) = softmax(scale * score) over the last axis."""
    return np.exp(log_probabilities(scores, scale))


def log_probabilities(scores: Float[np.ndarray, "*B k"], scale: float) -> Float[np.ndarray, "*B k"]:
    """log p(z|x), finite also where p(z|x) is too small for a float64."""
    logits = scale * np.asarray(scores, np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def arrangement_of(config: RunConfig) -> Arrangement:
    """How the devices here work together. Raises UserError where --mesh is of another number of them."""
    return arrange(config.parallelism, config.mesh_sizes, axes_of)


def load_models(config: RunConfig) -> tuple[Embedder, Generator]:
    """The untrained models of a run."""
    return load_untrained_embedder(config), load_untrained_generator(config)


def load_untrained_embedder(config: RunConfig) -> Embedder:
    """A run's embedder, with the prefixes that the run asks for."""
    return load_embedder(
        config.embedder, config.dtype, query_prefix=config.query_prefix, passage_prefix=config.passage_prefix
    )


def lora_of(config: RunConfig) -> LoraConfig | None:
    """The generator's adapters; None where all its weights are trained."""
    if not config.lora_rank:
        return None
    return LoraConfig(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)


def load_untrained_generator(config: RunConfig) -> Generator:
    """A run's generator. Weights that will be trained are float32, frozen ones have the run's dtype."""
    lora, arrangement = lora_of(config), arrangement_of(config)
    generator = load_generator(
        config.generator,
        config.dtype,
        None if config.quantize == "none" else config.quantize,
        param_dtype=config.dtype if lora else "float32",
        lora=lora,
        scan_layers=config.scan_layers,
        remat=config.remat,
        arrangement=arrangement,
    )
    # B starts at zero, so fresh adapters leave the model as it is.
    if not lora:
        return generator
    return dataclasses.replace(generator, lora=arrangement.keep(init_lora(generator, config.seed)))


def build_pipeline(
    config: RunConfig, dataset: Dataset, embedder: Embedder, generator: Generator | None, show_progress: bool = True
) -> Pipeline:
    """Opens the index of --index_dir; or encodes the corpus, or finds its vectors in the cache. Puts the pipeline
    together.

    Raises:
      UserError: --top_k is larger than the corpus, flags of the search contradict each other, the vectors cannot be
        stored, or the index is of something else.
    """
    store = dataset.passages
    check_top_k(config.top_k, store)
    _check_search(config)
    vectors, nearest = _open_vectors(config, embedder, store, show_progress)
    index = build_index(config, vectors, nearest, store, embedder, generator)
    # A re-ranker whose weights lie over all processes is asked by all of them, so each searches for all questions.
    shared = not reranks_by_likelihood(config)
    retriever = Retriever(index, vectors, nested=config.ranks_by_vectors, shared=shared)
    reader = None if generator is None else Reader(generator, prompt_builder(config, generator))
    return Pipeline(embedder, reader, store, retriever, _encode_cost(embedder, vectors))


def _encode_cost(embedder: Embedder, vectors: VectorShards) -> Cost:
    return Cost(vectors.seconds, encoding_flops(embedder.size, len(vectors), vectors.tokens), vectors.tokens)


def _check_search(config: RunConfig) -> None:
    """Raises UserError where flags of the search contradict each other."""
    if config.nprobe and not config.index_dir:
        raise UserError(f"--nprobe={config.nprobe} goes with --index_dir: give both, or leave it out.")
    if config.nprobe and (config.search_on == "device" or config.retriever == "bm25"):
        raise UserError(f"--nprobe={config.nprobe} is of lists on the host, which are not searched here: leave it out.")
    if config.search_on == "host":
        for name in ("device_dtype", "device_recall"):
            if getattr(config, name) != getattr(RunConfig, name):
                raise UserError(f"--{name} is of vectors on the accelerators: add --search_on=device, or leave it out.")
    elif config.retriever == "bm25":
        raise UserError("--search_on=device searches vectors, and --retriever=bm25 reads none: leave one of them out.")
    if config.hops == 2 and config.top_k == 1:
        raise UserError("--hops=2 takes half of the passages from each search: give --top_k at least 2.")
    if config.rerank and config.rerank_top < config.top_k:
        raise UserError(f"--rerank_top={config.rerank_top} is less than --top_k={config.top_k}: raise it.")


def prompt_builder(config: RunConfig, generator: Generator, stores: bool = True) -> PromptBuilder:
    """A run's prompts for its generator. stores: passages' token ids are kept in the cache."""
    folder = default_cache_dir() / "tokens"
    kept = {"stored": functools.partial(StoredTokens, folder=folder, made_by=generator.source.sha256)} if stores else {}
    return PromptBuilder(
        generator.tokenizer,
        generator.eos_token_id,
        config.max_passage_tokens,
        generator.config.max_position_embeddings,
        config.prompt,
        generator.config.vocab_size,
        **kept,
    )


def build_index(
    config: RunConfig,
    vectors: VectorStore,
    nearest: Index,
    store: PassageStore,
    embedder: Embedder,
    generator: Generator | None,
) -> Index:
    """What searches the corpus (`nearest` finds passages by their vectors), around that a second hop, around that a
    second look.

    This is where its type is chosen.
    """

    def over(index: Index) -> Retriever:
        return Retriever(index, vectors)

    def encode(texts: Sequence[str]) -> tuple[Float32[np.ndarray, "n E"], Cost]:
        tokens = embedder.query_tokens(texts)
        lengths = list(map(len, tokens))
        return embedder.encode_tokens(tokens), Cost(0.0, forward_flops(embedder.size, lengths, 0), sum(lengths))

    index = nearest
    if config.retriever != "dense":
        words = Bm25Index(store, default_cache_dir() / "bm25")
        index = words if config.retriever == "bm25" else HybridIndex(over(nearest), words)
    if config.hops == 2:
        index = TwoHopIndex(over(index), store, encode)
    if config.rerank:
        index = RerankedIndex(over(index), store, _reranker(config, generator), config.rerank_top)
    return index


def _open_vectors(
    config: RunConfig, embedder: Embedder, store: PassageStore, show_progress: bool
) -> tuple[VectorShards, Index]:
    """The passages' vectors, and what finds the nearest of them."""
    if config.index_dir:
        vectors, index = open_index(Path(config.index_dir), identity_of(embedder, store), config.nprobe)
    else:
        vectors = cached_vectors(embedder, store, default_cache_dir() / "vectors", show_progress)
        index = ExactIndex(vectors)
    if config.search_on == "device":
        index = DeviceIndex(vectors, config.device_dtype, config.device_recall)
    return vectors, index


def _reranker(config: RunConfig, generator: Generator | None) -> Reranker:
    """What --rerank names: the untrained generator (loaded here, where nothing else needs it), or a cross-encoder."""
    if reranks_by_likelihood(config):
        return QuestionLikelihood(generator or load_untrained_generator(config), config.max_passage_tokens)
    return load_cross_encoder(config.rerank, config.dtype)


def reranks_by_likelihood(config: RunConfig) -> bool:
    """Whether --rerank means the run's own generator: a folder of that name comes first, as with every model."""
    return located(config.rerank) == "generator"


def trained_collection(config: RunConfig) -> str:
    """Which collection of the generator is trained."""
    return COLLECTION if config.lora_rank else "params"
