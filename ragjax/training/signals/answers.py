"""Learning from the answers, with the generator in the graph: retrieval, prompts and answers, packed into rows."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ragjax.arrays import ModelVariables
from ragjax.config import RunConfig
from ragjax.costs import Ledger
from ragjax.data.batches import (
    Batch,
    Example,
    Shape,
    choose_shapes,
    fit_shape,
    make_batch,
    place_examples,
    sequence_lengths,
)
from ragjax.data.questions import Question
from ragjax.parallel import Layout
from ragjax.pipeline import Pipeline
from ragjax.runs import Run
from ragjax.training.objectives import AnswerMixture, AnswerObjective, ConcatenatedObjective
from ragjax.training.sampling import QuestionBatch
from ragjax.training.signals.question_side import QuestionSide
from ragjax.training.signals.signal import (
    Assembled,
    NoCache,
    Signal,
    answer_sampler,
    every_question,
    model_work,
)

# Passages whose lengths stand for the corpus when the compiled shapes are chosen. A corpus of up to this size is
# measured as a whole, and rows are then no longer than its longest passage needs.
_LENGTH_SAMPLE = 20_000
_TRIED_PROMPTS = 2_000


class AnswerAssembler(NoCache):
    """Batches with prompts and answers: the generator runs inside the step."""

    def __init__(self, run: Run, trains: Sequence[str]):
        """trains: the models that are trained, of "embedder" and "generator"."""
        config = run.config
        self._trains, self._pipeline = trains, run.pipeline
        self.passages_cut: set[str] = set()
        self.sampler = answer_sampler(run)
        self._side = QuestionSide(run, self.sampler, moves="embedder" in trains)
        self.objective = answer_objective(run, trains)
        self._per_prompt = prompt_passages(config)
        lengths, longest, answers = prompt_lengths(run, [*self.sampler.train, *self.sampler.dev], self._per_prompt)
        layout, prompts = self._side.layout, config.top_k // self._per_prompt  # of each question
        shapes = choose_shapes(lengths, answers, layout.size * prompts, longest, layout.parts)
        self._ways = [(layout, shapes), _cut(layout, prompts, shapes[-1])]

    def assemble(self, batch: QuestionBatch, variables: ModelVariables, ledger: Ledger) -> Assembled:
        return self.with_passages(batch, self._side.retrieve(batch, variables, ledger))

    def with_passages(self, batch: QuestionBatch, rows: np.ndarray) -> Assembled:
        """The batch of questions under the given passages [b, K] (row numbers, best first)."""
        vectors = self._pipeline.retriever.vectors.vectors_of(rows)
        examples = [
            self._example(*parts)
            for parts in zip(batch.indices, batch.questions, batch.tokens, vectors, rows, strict=True)
        ]
        layout, shape, examples = self._laid_out(examples, is_first=batch.training and batch.step == 0)

        def make(part: Sequence[Example]) -> Batch:
            return make_batch(part, shape, layout.size, self._side.question_length)

        lengths = sequence_lengths([example.prompts for example in examples], [e.answer for e in examples])
        head = sum(len(example.answer) * len(example.prompts) for example in examples)
        generator = self._pipeline.generator.size
        work = {"generator": model_work(generator, lengths, head, self._learns("generator", batch))}
        if self._per_prompt == 1:
            work["embedder"] = self._side.work(batch, self._learns("embedder", batch))
        figures = {"generator_tokens": sum(lengths), "distinct_passages": len(np.unique(rows))}
        return Assembled(layout.stack(examples, make), work, figures, rows)

    def _laid_out(self, examples: Sequence[Example], is_first: bool) -> tuple[Layout, Shape, list[Example]]:
        """How a step is cut up, the shape of its micro-batches, and its examples with their places in them."""
        ways = self._ways
        if is_first:  # the largest, so that a step which does not fit into memory is this one, not one in mid-run
            ways = sorted(((layout, shapes[-1:]) for layout, shapes in ways), key=lambda way: -way[1][0].rows)
        for layout, shapes in ways:
            parts = [place_examples(part, shapes[0].row_length) for part in layout.split(examples)]
            placed = [example for part in parts for example in part]
            if shape := fit_shape(shapes, placed):
                return layout, shape, placed
        raise AssertionError("every prompt has a row of its own in the last way")

    def _learns(self, model: str, batch: QuestionBatch) -> bool:
        return batch.training and model in self._trains

    def _example(
        self, index: int, question: Question, tokens: Sequence[int], vectors: np.ndarray, rows: np.ndarray
    ) -> Example:
        prompts, passages = self._pipeline.prompts, self._pipeline.passages(rows)
        answer = prompts.answer(question.answers[0])
        groups = [passages[k : k + self._per_prompt] for k in range(0, len(passages), self._per_prompt)]
        built = [prompts.prompt(group, question.question, reserve=len(answer)) for group in groups]
        self.passages_cut.update(*(prompt.cut for prompt in built))
        return Example(index, tokens, vectors, [prompt.ids for prompt in built], answer)


def _cut(layout: Layout, prompts: int, largest: Shape) -> tuple[Layout, tuple[Shape]]:
    """How a step is done that does not fit the largest shape: in smaller micro-batches, each prompt in its own row.

    prompts: of each question, which stay together. Sums run over all micro-batches, so the step's result is the same;
    the rows of one are as many as the largest shape has, or as one question needs.
    """
    times = next((n for n in range(1, layout.size) if layout.cut(n).size * prompts <= largest.rows), layout.size)
    finer = layout.cut(times)
    return finer, (dataclasses.replace(largest, rows=finer.size * prompts),)


def prompt_passages(config: RunConfig) -> int:
    """Passages in each prompt that is trained on."""
    return config.top_k if config.objective == "concat_nll" else 1


def check_prompts(pipeline: Pipeline, questions: Sequence[Question], per_prompt: int) -> None:
    """Raises UserError, naming it, where a question and its answer are too long for the generator's window."""
    for question in questions:
        pipeline.check_room(question, per_prompt, reserve=len(pipeline.prompts.answer(question.answers[0])))


def answer_objective(run: Run, trains: Sequence[str]) -> AnswerObjective | ConcatenatedObjective:
    """What the configuration's --objective minimises."""
    config, dropout = run.config, run.config.lora_dropout > 0
    if config.objective == "concat_nll":
        return ConcatenatedObjective(run.generator.module, dropout)
    return AnswerObjective(run.embedder.module, run.generator.module, answer_mixture(config, trains), dropout)


def answer_mixture(config: RunConfig, trains: Sequence[str]) -> AnswerMixture:
    """The loss over single passages; the retriever's own has no part in it while the embedder is frozen."""
    retriever = config.retriever_objective if "embedder" in trains else "marginal"
    return AnswerMixture(config.objective, config.score_scale, retriever, config.retriever_temperature)


def prompt_lengths(run: Run, questions: Sequence[Question], per_prompt: int) -> tuple[list[int], int, list[int]]:
    """Lengths of prompts of `per_prompt` passages with their answers, in tokens.

    Returns:
      A sample of them, a bound that none exceeds, and the length of every answer.
    """
    prompts, store = run.pipeline.prompts, run.pipeline.store
    answers = [len(prompts.answer(question.answers[0])) for question in questions]
    check_prompts(run.pipeline, questions, per_prompt)
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


ANSWERS = Signal(
    "answers",
    AnswerAssembler,
    learns_from=every_question,
    reads_answers=True,
    batch_size_flag="batch_size",
    flags=("objective", "loss_reduction", "dev_limit"),
    cost_parts={
        ("generator",): ("generator_train", "embedder_forward", "search"),
        ("embedder", "generator"): ("generator_train", "embedder_train", "search"),
    },
)
