"""From a step's questions to its batch: one assembler for each signal that a phase learns from.

    AnswerAssembler        retrieval, prompts and answers: both models' inputs
    LikelihoodAssembler    retrieval, and the frozen generator's answer log-probs from the cache
    RankingAssembler       (ranking.py) labelled passages and negatives

Each has `questions` (those it trains on), `dev`, `objective`, `batch_size`, and `assemble`.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from ragjax.config import RunConfig
from ragjax.costs import Cost, Ledger, ModelSize, forward_flops, train_flops
from ragjax.data.batches import (
    Batch,
    Example,
    ScoredBatch,
    Shape,
    choose_shapes,
    fit_shape,
    make_batch,
    pad_tokens,
    round_up,
    sequence_lengths,
)
from ragjax.data.questions import Question
from ragjax.models.encoders import sentence_vectors
from ragjax.parallel import layout_of
from ragjax.pretrained import embed
from ragjax.retrieval import Queries
from ragjax.runs import Run
from ragjax.training.likelihoods import Likelihoods, row_limits
from ragjax.training.objectives import AnswerMixture, AnswerObjective, LikelihoodObjective, Objective
from ragjax.training.strategies import Phase

Tree = Mapping[str, Any]

# Passages whose lengths stand for the corpus when the compiled shapes are chosen. A corpus of at most so many is
# measured whole, and rows are then no longer than its longest passage needs.
_LENGTH_SAMPLE = 20_000
_TRIED_PROMPTS = 2_000


class Asked(NamedTuple):
    """The questions of a batch."""

    questions: Sequence[Question]
    indices: Sequence[int]  # their places in their split
    step: int  # optimizer steps done
    training: bool  # or measured only: decides how the step's own work is counted


@dataclasses.dataclass(frozen=True)
class Assembled:
    """A step's batch [groups, micro-batches, ...] and what is in it."""

    batch: Any
    work: dict[str, Cost]  # of each model inside the compiled step, seconds left out
    figures: dict[str, int]  # for metrics.jsonl
    passage_rows: np.ndarray | None = None  # [questions, K]


class Assembler(Protocol):
    """What the training loop asks of an assembler. It holds no state that a step changes, but for caches."""

    questions: Sequence[Question]  # that it trains on
    dev: Sequence[Question]
    objective: Objective
    batch_size: int

    def assemble(self, asked: Asked, embedder_variables: Tree, ledger: Ledger) -> Assembled:
        """The batch of at most `batch_size` questions; what is computed on the way (retrieval, likelihoods) is charged
        to the ledger.
        """

    @property
    def position(self) -> int:
        """How far its cache, if it has one, has grown: goes into the checkpoint."""

    def rewind(self, position: int) -> None:
        """Takes the cache back to a checkpoint's position."""


_embed_stacked = jax.jit(jax.vmap(sentence_vectors, in_axes=(None, 0, None, None)), static_argnums=0)


class QuestionSide:
    """The embedder's half of every batch, and the layout of its questions."""

    def __init__(self, run: Run, questions: Sequence[Question], batch_size: int):
        """questions: all that will be assembled (training and dev), for the bound on lengths."""
        self._pipeline = run.pipeline
        self.layout = layout_of(batch_size, run.config.gradient_accumulation)
        self._top_k = run.config.top_k
        self._batch_size = batch_size
        longest = max(map(len, run.embedder.query_tokens([q.question for q in questions])))
        self.question_length = round_up(longest, 8)

    def tokens(self, questions: Sequence[Question]) -> list[list[int]]:
        return self._pipeline.embedder.query_tokens([question.question for question in questions])

    def vectors(self, questions: Sequence[Question], variables: Tree) -> np.ndarray:
        """[b, E] from the embedder's given variables."""
        padded, lengths = pad_tokens(self.tokens(questions), self._batch_size, self.question_length)
        return np.asarray(embed(self._pipeline.embedder.module, variables, padded, lengths))[: len(questions)]

    def stacked_vectors(self, questions: Sequence[Question], variables: Tree) -> np.ndarray:
        """[copies * b, E] from stacked variables [copies, ...], copy by copy."""
        padded, lengths = pad_tokens(self.tokens(questions), self._batch_size, self.question_length)
        vectors = np.asarray(_embed_stacked(self._pipeline.embedder.module, variables, padded, lengths))
        return vectors[:, : len(questions)].reshape(-1, vectors.shape[-1])

    def retrieve(self, questions: Sequence[Question], variables: Tree, ledger: Ledger, copies: int = 0) -> np.ndarray:
        """Passage rows [b, K], best first, by the embedder's given variables; [copies, b, K] where they are stacked."""
        embedder = self._pipeline.embedder
        began = time.perf_counter()
        vectors = (self.stacked_vectors if copies else self.vectors)(questions, variables)
        embedded = time.perf_counter()
        texts = [question.question for question in questions] * max(copies, 1)
        found = self._pipeline.retriever.retrieve(Queries(texts, vectors), self._top_k)
        lengths = list(map(len, self.tokens(questions))) * max(copies, 1)
        ledger.add("embedder", Cost(embedded - began, forward_flops(embedder.size, lengths, 0), sum(lengths)))
        ledger.add("search", found.cost)
        return found.rows.reshape(copies, len(questions), -1) if copies else found.rows

    def work(self, questions: Sequence[Question], training: bool) -> Cost:
        """The embedder's work inside a step."""
        return model_work(self._pipeline.embedder.size, list(map(len, self.tokens(questions))), 0, training)


def model_work(size: ModelSize, lengths: Sequence[int], head_positions: int, training: bool) -> Cost:
    """FLOPs and tokens of one model in a step."""
    count = train_flops if training else forward_flops
    tokens = sum(lengths)
    return Cost(0.0, count(size, lengths, head_positions), tokens, tokens if training else 0)


class NoCache:
    """The part of an assembler that has nothing to remember."""

    position = 0

    def rewind(self, position: int) -> None:
        pass


class AnswerAssembler(NoCache):
    """Batches with prompts and answers: the generator runs inside the step."""

    def __init__(self, run: Run, phase: Phase):
        config = run.config
        self.questions, self.dev = run.dataset.train, dev_questions(run)
        self.batch_size = config.batch_size
        self._phase, self._pipeline = phase, run.pipeline
        everything = [*self.questions, *self.dev]
        self._side = QuestionSide(run, everything, self.batch_size)
        self._concatenated = config.objective == "concat_nll"
        self.objective = AnswerObjective(
            run.embedder.module,
            run.generator.module,
            None if self._concatenated else answer_mixture(config, phase),
            dropout=config.lora_dropout > 0,
        )
        per_prompt = config.top_k if self._concatenated else 1
        lengths, longest, answers = prompt_lengths(run, everything, per_prompt)
        prompts_per_batch = self._side.layout.size * config.top_k // per_prompt
        self._shapes = choose_shapes(lengths, answers, prompts_per_batch, longest)

    def assemble(self, asked: Asked, embedder_variables: Tree, ledger: Ledger) -> Assembled:
        return self.with_passages(asked, self._side.retrieve(asked.questions, embedder_variables, ledger))

    def with_passages(self, asked: Asked, rows: np.ndarray) -> Assembled:
        """The batch of questions under the given passages [b, K] (row numbers, best first)."""
        questions, indices, _, training = asked
        tokens, vectors = self._side.tokens(questions), self._pipeline.retriever.vectors.vectors_of(rows)
        examples = [self._example(*parts) for parts in zip(indices, questions, tokens, vectors, rows, strict=True)]
        shape = fit_shape(self._shapes, self._side.layout.split(examples))
        batch = self._side.layout.stack(examples, lambda group: self._make(group, shape))
        lengths = sequence_lengths([example.prompts for example in examples], [e.answer for e in examples])
        head = sum(len(example.answer) * len(example.prompts) for example in examples)
        generator = self._pipeline.generator.size
        work = {"generator": model_work(generator, lengths, head, training and "generator" in self._phase.trains)}
        if not self._concatenated:
            work["embedder"] = self._side.work(questions, training and "embedder" in self._phase.trains)
        figures = {"generator_tokens": sum(lengths), "distinct_passages": len(np.unique(rows))}
        return Assembled(batch, work, figures, rows)

    def _make(self, examples: Sequence[Example], shape: Shape) -> Batch:
        return make_batch(examples, shape, self._side.layout.size, self._side.question_length)

    def _example(
        self, index: int, question: Question, tokens: list[int], vectors: np.ndarray, rows: np.ndarray
    ) -> Example:
        prompts, passages = self._pipeline.prompts, self._pipeline.passages(rows)
        answer = prompts.answer(question.answers[0])
        groups = [passages] if self._concatenated else [[passage] for passage in passages]
        built = [prompts.prompt(group, question.question, reserve=len(answer)) for group in groups]
        return Example(index, tokens, vectors, built, answer)


class LikelihoodAssembler:
    """Batches with the frozen generator's answer log-probs: only the embedder runs inside the step."""

    def __init__(self, run: Run, phase: Phase):
        """The likelihoods are kept in the run's folder."""
        self.questions, self.dev = run.dataset.train, dev_questions(run)
        self.batch_size = run.config.batch_size
        self._pipeline = run.pipeline
        everything = [*self.questions, *self.dev]
        self.side = QuestionSide(run, everything, self.batch_size)
        self.objective = LikelihoodObjective(run.embedder.module, answer_mixture(run.config, phase))
        lengths, longest, answers = prompt_lengths(run, everything, 1)
        shortest = min(run.pipeline.prompts.frame_length(question.question, 1) for question in everything)
        limits = row_limits(lengths, shortest, longest, answers)
        self._answer_length = limits.longest_answer
        self.likelihoods = Likelihoods(run.generator, limits, run.files.likelihoods_file)

    @property
    def position(self) -> int:
        return self.likelihoods.position

    def rewind(self, position: int) -> None:
        self.likelihoods.rewind(position)

    def assemble(self, asked: Asked, embedder_variables: Tree, ledger: Ledger) -> Assembled:
        questions = asked.questions
        rows = self.side.retrieve(questions, embedder_variables, ledger)
        scores, tokens = self.score(questions, [rows], ledger)
        batch = self.batch(questions, rows, scores)
        figures = {"generator_tokens": tokens, "distinct_passages": len(np.unique(rows))}
        return Assembled(batch, {"embedder": self.side.work(questions, asked.training)}, figures, rows)

    def assemble_stacked(
        self, asked: Asked, stacked_variables: Tree, copies: int, ledger: Ledger
    ) -> tuple[list[ScoredBatch], Cost]:
        """A batch for each copy of the embedder, and the work that one of them is in a step."""
        questions = asked.questions
        rows = self.side.retrieve(questions, stacked_variables, ledger, copies)
        scores, _ = self.score(questions, rows, ledger)
        return [self.batch(questions, found, scores) for found in rows], self.side.work(questions, asked.training)

    def score(
        self, questions: Sequence[Question], alternatives: Sequence[np.ndarray], ledger: Ledger
    ) -> tuple[dict[tuple[int, int], np.ndarray], int]:
        """The answers' log-probs under each of the questions' passages, alternatives [b, K] each.

        Returns:
          {(question's place in the batch, passage row): [T_i]}, and the tokens that the generator read for it: only
          pairs that are new are scored.
        """
        prompts, store = self._pipeline.prompts, self._pipeline.store
        pairs = sorted({(i, int(row)) for rows in alternatives for i, chosen in enumerate(rows) for row in chosen})
        answers = [self._answer(questions[i]) for i, _ in pairs]
        built = [
            prompts.prompt([store[row]], questions[i].question, reserve=len(answer))
            for (i, row), answer in zip(pairs, answers, strict=True)
        ]
        scores, cost = self.likelihoods.score(built, answers)
        ledger.add("generator", cost)
        return dict(zip(pairs, scores, strict=True)), cost.tokens

    def batch(
        self, questions: Sequence[Question], rows: np.ndarray, scores: Mapping[tuple[int, int], np.ndarray]
    ) -> ScoredBatch:
        """[groups, micro-batches, ...] of the questions under the given passages [b, K], whose `score` is given."""
        vectors, tokens = self._pipeline.retriever.vectors.vectors_of(rows), self.side.tokens(questions)
        items = [
            (
                tokens[i],
                vectors[i],
                np.stack([self._padded(scores[i, int(row)]) for row in chosen]),
                len(self._answer(questions[i])),
            )
            for i, chosen in enumerate(rows)
        ]
        return self.side.layout.stack(items, self._make)

    def _answer(self, question: Question) -> list[int]:
        return self._pipeline.prompts.answer(question.answers[0])

    def _padded(self, scores: np.ndarray) -> np.ndarray:
        return np.pad(scores, (0, self._answer_length - len(scores)))

    def _make(self, items: Sequence[tuple]) -> ScoredBatch:
        size = self.side.layout.size
        tokens, vectors, scores, lengths = zip(*items, strict=True)
        padded, question_lengths = pad_tokens(tokens, size, self.side.question_length)
        mask = np.arange(self._answer_length) < np.asarray(lengths)[:, None]
        return ScoredBatch(padded, question_lengths, *(_fill(np.stack(part), size) for part in (vectors, scores, mask)))


def _fill(values: np.ndarray, size: int) -> np.ndarray:
    """Zeros behind the first axis up to `size`."""
    return np.concatenate([values, np.zeros((size - len(values), *values.shape[1:]), values.dtype)])


def answer_mixture(config: RunConfig, phase: Phase) -> AnswerMixture:
    """The phase's loss; the retriever's own has no part in it while the embedder is frozen."""
    retriever = config.retriever_objective if "embedder" in phase.trains else "marginal"
    return AnswerMixture(config.objective, config.score_scale, retriever, config.retriever_temperature)


def dev_questions(run: Run) -> Sequence[Question]:
    """Questions of the dev loss."""
    return run.dataset.dev[: run.config.dev_limit] if run.config.dev_every else []


def prompt_lengths(run: Run, questions: Sequence[Question], per_prompt: int) -> tuple[list[int], int, list[int]]:
    """Lengths of prompts of `per_prompt` passages with their answers, in tokens.

    Returns:
      A sample of them, a bound that none exceeds, and the length of every answer.
    """
    prompts, store = run.pipeline.prompts, run.pipeline.store
    answers = [len(prompts.answer(question.answers[0])) for question in questions]
    for question, answer in zip(questions, answers, strict=True):
        prompts.room(question.question, per_prompt, reserve=answer)
    stride = -(-len(store) // _LENGTH_SAMPLE)
    passages = [len(prompts.passage(store[row])) for row in range(0, len(store), stride)]
    longest_passage = max(passages) if stride == 1 else run.config.max_passage_tokens
    # Passages and questions meet at random, under a seed that no flag moves: the shapes belong to the data.
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.asarray(passages), (_TRIED_PROMPTS, per_prompt)).sum(axis=1)
    frames = [prompts.frame_length(question.question, per_prompt) for question in questions]
    lengths = np.minimum(drawn + rng.choice(np.asarray(frames), _TRIED_PROMPTS) + max(answers), prompts.window)
    longest = min(max(frames) + per_prompt * longest_passage + max(answers), prompts.window)
    return lengths.tolist(), longest, answers
