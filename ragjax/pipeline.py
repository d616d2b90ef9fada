"""The whole pipeline: question -> vector -> passages -> prompt -> answer, and the folder of a run that trained it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ragjax.checkpoints import Checkpoints
from ragjax.config import RunConfig
from ragjax.costs import Cost, forward_flops
from ragjax.data.prompts import PromptBuilder
from ragjax.data.questions import Passage
from ragjax.data.sources import Dataset, load_dataset
from ragjax.errors import UserError, reason
from ragjax.files import default_cache_dir, read_json_object
from ragjax.generation import can_stream, stream_answer
from ragjax.models.lora import COLLECTION, LoraConfig
from ragjax.pretrained import Embedder, Generator, init_lora, load_embedder, load_generator
from ragjax.retrieval import EncodedCorpus, ExactIndex, PassageStore, encode_corpus

Tree = Mapping[str, Any]

CONFIG_FILE = "config.json"
CHECKPOINT_FOLDER = "checkpoints"
SUMMARY_FILE = "summary.json"


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Passages of B questions, best first."""

    rows: np.ndarray  # [B, k] int64, row numbers in the corpus
    scores: np.ndarray  # [B, k] float32, inner products


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """An embedder, its index over one corpus, and a generator."""

    embedder: Embedder
    generator: Generator
    store: PassageStore
    index: ExactIndex
    prompts: PromptBuilder
    encode_cost: Cost  # of the passage vectors, also where an earlier run computed them

    def check_top_k(self, top_k: int) -> None:
        """Raises UserError where there are fewer passages than would be read."""
        if top_k > len(self.store):
            raise UserError(f"--top_k={top_k} is more than the {len(self.store)} passages: lower it.")

    def retrieve(self, questions: Sequence[str], k: int) -> Retrieval:
        """The k nearest passages of each question."""
        rows, scores = self.index.search(self.embedder.encode(questions), k)
        return Retrieval(rows, scores)

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
    store = PassageStore(dataset.passages)
    encoded = encode_corpus(
        embedder.encode,
        store.embedder_texts,
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
    )
    cost = _encode_cost(embedder, encoded, len(store))
    return Pipeline(embedder, generator, store, ExactIndex(np.asarray(encoded.vectors)), prompts, cost)


def _encode_cost(embedder: Embedder, encoded: EncodedCorpus, passages: int) -> Cost:
    """FLOPs from the token count, every passage taken at the mean length (attention is a few percent here)."""
    lengths = [encoded.tokens / passages] * passages
    return Cost(encoded.seconds, forward_flops(embedder.size, lengths, 0), encoded.tokens)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder that was opened: its configuration, data and trained pipeline."""

    config: RunConfig
    folder: Path
    dataset: Dataset
    pipeline: Pipeline
    step: int  # of the last checkpoint that was read; 0 for a strategy that trains nothing

    def unfinished(self) -> str | None:
        """A sentence for the user where training has not come to its end."""
        if (self.folder / SUMMARY_FILE).is_file():
            return None
        return f"{self.folder} is not finished: its last checkpoint, step {self.step}, is used."


def read_run_record(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """A run folder's configuration, and all that its config.json holds. Raises UserError where it holds no run."""
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder} holds no {CONFIG_FILE}: give --run_dir the folder of a ragjax.train run.")
    record = read_json_object(folder / CONFIG_FILE)
    try:
        if missing := {"flags", "phases", "inputs"} - record.keys():
            raise TypeError(f"it lacks {sorted(missing)[0]!r}")
        return RunConfig(**record["flags"]), record
    except TypeError as error:  # a flag that this version does not know, too
        raise UserError(
            f"{folder / CONFIG_FILE} is not that of a run of this version ({reason(error)}): give --run_dir the folder "
            "of a ragjax.train run."
        ) from error


def open_run(run_dir: str | Path) -> Run:
    """The trained pipeline of a run folder, from its last checkpoint.

    Raises:
      UserError: the folder holds no run, no checkpoint yet, or its models or data have changed since.
    """
    folder = Path(run_dir)
    config, record = read_run_record(folder)
    dataset = load_dataset(config.data)
    embedder, generator = load_models(config)
    check_unchanged(record, folder, dataset, embedder, generator)
    pipeline = build_pipeline(config, dataset, embedder, generator)
    phases = read_phases(folder, record["phases"])
    for phase in phases:
        pipeline = pipeline.with_trained(jax.tree.map(jax.numpy.asarray, phase.trained))
    return Run(config, folder, dataset, pipeline, phases[-1].step if phases else 0)


@dataclasses.dataclass(frozen=True)
class TrainedPhase:
    """A phase's last checkpoint."""

    name: str
    step: int
    trained: dict[str, dict[str, Tree]]  # {"embedder" | "generator": {collection: parameters}} on the host


def read_phases(folder: Path, phases: Sequence[str]) -> list[TrainedPhase]:
    """What a run has trained so far: the last checkpoint of each phase, up to the first that has none.

    Raises:
      UserError: there should be a checkpoint and is none, or one is damaged.
    """
    found = []
    for name in phases:
        path = folder / CHECKPOINT_FOLDER / name
        # Asking for the checkpoints of a folder that is not there would make it.
        checkpoints = Checkpoints(path) if path.is_dir() else None
        if checkpoints is None or checkpoints.latest_step() is None:
            break
        step, trees, _ = checkpoints.restore({"trainable": None})
        found.append(TrainedPhase(name, step, trees["trainable"]))
    if phases and not found:
        raise UserError(f"{folder} holds no checkpoint: run ragjax.train on this run folder first.")
    return found


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer and what it rests on."""

    text: str
    probability: float  # p(y|x) of the answer and its end: its decoder's model's (of rag_sequence, under all passages)
    passages: list[Passage]  # best first
    probabilities: np.ndarray  # [K], p(z|x)
    posterior: np.ndarray  # [K], p(z|x,y), proportional to p(z|x) p(y|x,z)


def ask(run: Run, question: str, config: RunConfig, show: Callable[[str], None] | None = None) -> Answer:
    """Answers a question.

    Args:
      run: what answers.
      question: its text.
      config: top_k, score_scale, and how the answer is decoded.
      show: called with the text so far, each time that it has grown.

    Raises:
      UserError: top_k is larger than the corpus, or the question too long for the generator's window.
    """
    pipeline, generator = run.pipeline, run.pipeline.generator
    pipeline.check_top_k(config.top_k)
    retrieved = pipeline.retrieve([question], config.top_k)
    rows, scores = retrieved.rows[0], retrieved.scores[0]
    prompts, log_weights = pipeline.decoding_prompts(question, rows, scores, config)
    if show is not None and can_stream(config):
        new_tokens: list[int] = []
        for new_tokens in stream_answer(generator, prompts, log_weights, config):
            show(pipeline.prediction(new_tokens))
    else:
        (decoded,) = generator.prepared().decode_answers([prompts], log_weights[None], config, 1)
        new_tokens = decoded.tokens
    text = pipeline.prediction(new_tokens)
    if show is not None:
        show(text)
    answer = generator.answer_ids(text)
    one_by_one = dataclasses.replace(config, decode="rag_sequence")
    alone, log_shares = pipeline.decoding_prompts(question, rows, scores, one_by_one)
    under = np.array(generator.score_tokens(alone, [answer] * len(alone)), np.float64)  # [K, T]
    shares, log_joint = np.exp(log_shares), log_shares + under.sum(axis=1)  # p(z|x) and log p(z|x) p(y|x,z)
    if config.decode == "concat":
        probability = np.exp(generator.score_tokens(prompts, [answer])[0].sum(dtype=np.float64))
    elif config.decode == "rag_token":
        probability = np.prod(shares @ np.exp(under))
    else:
        probability = np.exp(log_joint).sum()
    return Answer(text, float(probability), pipeline.passages(rows), shares, probabilities(log_joint, scale=1.0))


def describe_inputs(dataset: Dataset, embedder: Embedder, generator: Generator) -> dict[str, Any]:
    """What a run is made from, with hashes: part of config.json."""
    return {
        "embedder": {"source": embedder.describe(), "sha256": embedder.source.sha256},
        "generator": {"source": generator.describe(), "sha256": generator.source.sha256},
        "data": {"name": dataset.name, "sha256": dataset.sha256},
    }


def check_unchanged(
    record: Mapping[str, Any], folder: Path, dataset: Dataset, embedder: Embedder, generator: Generator
) -> None:
    """Raises UserError where a model's or the data's content is no longer what the run was started with."""
    for name, now in describe_inputs(dataset, embedder, generator).items():
        check_input_unchanged(record, folder, name, now["sha256"])


def check_input_unchanged(record: Mapping[str, Any], folder: Path, name: str, sha256: str) -> None:
    """Raises UserError where the input `name` of the run in `folder` now has another hash than its record says."""
    before = record["inputs"][name]["sha256"]
    if before != sha256:
        raise UserError(
            f"{folder} was made with another content of --{name} (sha256 {before[:12]}, now {sha256[:12]}): bring that "
            "back or choose another --run_dir."
        )


def trained_collection(config: RunConfig) -> str:
    """Which collection of the generator is trained."""
    return COLLECTION if config.lora_rank else "params"
