"""What a signal is, and what its assembler promises to the training loop."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ragjax.arrays import ModelVariables
from ragjax.config import RunConfig
from ragjax.costs import Cost, Ledger, ModelSize, forward_flops, train_flops
from ragjax.data.dataset import Dataset
from ragjax.data.questions import Question
from ragjax.pretrained import Embedder, Generator
from ragjax.runs import Run
from ragjax.training.objectives import AnswerMixture, Objective
from ragjax.training.sampling import QuestionBatch, Sampler


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A step's batch [groups, micro-batches, ...] and what is in it."""

    batch: Any
    work: dict[str, Cost]  # of each model inside the compiled step, seconds left out
    figures: dict[str, int]  # for metrics.jsonl
    passage_rows: np.ndarray | None = None  # [questions, K]


class Assembler(Protocol):
    """Questions -> batch. It holds no state that a step changes, but for caches."""

    @property
    def sampler(self) -> Sampler: ...

    @property
    def objective(self) -> Objective: ...

    @property
    def passages_cut(self) -> set[str]:
        """Ids of the passages that some prompt has held shortened; goes into the checkpoint."""

    def assemble(self, batch: QuestionBatch, variables: ModelVariables, ledger: Ledger) -> Assembled:
        """The batch of at most `sampler.batch_size` questions; what is computed on the way (retrieval, likelihoods) is
        charged to the ledger.
        """

    @property
    def looks_ahead(self) -> bool:
        """Whether a batch follows from its questions alone: it can then be made while the step before is computed."""

    @property
    def position(self) -> int:
        """How far its cache, if it has one, has grown: goes into the checkpoint."""

    def rewind(self, position: int) -> None:
        """Takes the cache back to a checkpoint's position."""


@runtime_checkable
class StackableAssembler(Assembler, Protocol):
    """An assembler whose questions several copies of the embedder can share."""

    def assemble_stacked(
        self, batch: QuestionBatch, variables: ModelVariables, copies: int, ledger: Ledger
    ) -> tuple[list[Any], Cost]:
        """A batch for each copy of the embedder, and the work that one of them is in a step.

        variables: the embedder's are stacked, [copies, ...].
        """

    @property
    def pairs_scored(self) -> int:
        """(question, passage) pairs that a generator was asked for so far."""


class NoCache:
    """The part of an assembler that has nothing to remember."""

    position = 0
    pairs_scored = 0

    def rewind(self, position: int) -> None:
        pass


class Models(Protocol):
    """What a step is made of besides its batch: a `Run`, or models of which only the shapes are known."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def embedder(self) -> Embedder: ...

    @property
    def generator(self) -> Generator: ...

    @property
    def variables(self) -> ModelVariables:
        """Of the models that are there."""


@dataclasses.dataclass(frozen=True)
class Signal:
    """What a phase learns from."""

    name: str
    make_assembler: Callable[[Run, Sequence[str]], Assembler]  # (run, the models that are trained)
    make_objective: Callable[[Models, Sequence[str]], Objective]  # that of the assembler
    learns_from: Callable[[Question], bool]  # whether it can use a question
    reads_answers: bool  # a generator, in the graph or frozen, says how likely they are
    batch_size_flag: str  # of RunConfig
    flags: tuple[str, ...]  # besides that one, those of RunConfig that only phases with such signals read
    # The parts of a question's cost (`ragjax.training.estimates`), by what is trained.
    cost_parts: Mapping[tuple[str, ...], tuple[str, ...]]
    scores_once: bool = False  # the generator works in the first epoch only


def every_question(question: Question) -> bool:
    """Whether a question can be used: any can."""
    return True


def model_work(size: ModelSize, lengths: Sequence[int], head_positions: int, training: bool) -> Cost:
    """FLOPs and tokens of one model in a step."""
    count = train_flops if training else forward_flops
    tokens = sum(lengths)
    return Cost(0.0, count(size, lengths, head_positions), tokens, tokens if training else 0)


def answer_sampler(run: Run) -> Sampler:
    """The questions of a phase that learns from answers."""
    config, dataset = run.config, run.dataset
    return Sampler(
        dataset.train, dev_questions(config, dataset), config.batch_size, config.seed, run.embedder.query_tokens
    )


def answer_mixture(config: RunConfig, trains: Sequence[str]) -> AnswerMixture:
    """The loss over single passages; the retriever's own has no part in it while the embedder is frozen."""
    retriever = config.retriever_objective if "embedder" in trains else "marginal"
    return AnswerMixture(config.objective, config.score_scale, retriever, config.retriever_temperature)


def dev_questions(config: RunConfig, dataset: Dataset) -> Sequence[Question]:
    """Questions of the dev loss; none where --dev_every=0."""
    return [] if config.dev_every == 0 else dataset.dev[: config.dev_limit]
