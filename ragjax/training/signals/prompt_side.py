"""The generator's half of a batch: prompts with their answers, packed into rows of a few shapes."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ragjax.config import RunConfig
from ragjax.costs import Cost, ModelSize
from ragjax.data.batches import (
    Example,
    QuestionLengths,
    Shape,
    choose_shapes,
    fit_shape,
    place_examples,
    sequence_lengths,
)
from ragjax.data.passages import PassageStore
from ragjax.data.prompts import PromptBuilder
from ragjax.data.questions import Question
from ragjax.parallel import Layout
from ragjax.pipeline import Pipeline
from ragjax.runs import Run
from ragjax.training.answer_scorer import RowLimits, row_limits
from ragjax.training.sampling import QuestionBatch, Sampler
from ragjax.training.signals.question_side import QuestionSide
from ragjax.training.signals.signal import model_work

# Passages whose lengths stand for the corpus when the compiled shapes are chosen. A corpus of up to this size is
# measured as a whole, and rows are then no longer than its longest passage needs.
_LENGTH_SAMPLE = 20_000


class PromptLengths(NamedTuple):
    """Of prompts with their answers, in tokens."""

    sample: list[QuestionLengths]  # of some questions, under the passages that they find
    shortest: int  # none is shorter
    longest: int  # none is longer
    answers: list[int]  # of every answer alone

    def limits(self) -> RowLimits:
        """For scoring such prompts forward only."""
        read = [length for each in self.sample for length in each.prompts]
        return row_limits(read, self.shortest, self.longest, self.answers)


class PromptSide:
    """What an assembler does with the passages that its questions have found."""

    def __init__(self, run: Run, layout: Layout, lengths: PromptLengths, per_prompt: int, packed: int):
        """per_prompt: passages in each prompt. packed: prompts of each question that a step packs into rows."""
        self._pipeline, self._per_prompt = run.pipeline, per_prompt
        self.passages_cut: set[str] = set()
        self._ways = ways_of(layout, lengths, packed)

    def examples(self, batch: QuestionBatch, rows: np.ndarray) -> list[Example]:
        """The questions under the given passages [b, K] (row numbers, best first)."""
        vectors = self._pipeline.retriever.vectors.vectors_of(rows)
        return [
            self._example(*parts)
            for parts in zip(batch.indices, batch.questions, batch.tokens, vectors, rows, strict=True)
        ]

    def lay_out(self, examples: Sequence[Example], is_first: bool) -> tuple[Layout, Shape, list[Example]]:
        """How a step is cut up, the shape of its micro-batches, and its examples with their places in them.

        is_first: of the phase's steps.
        """
        for layout, shapes in largest_first(self._ways) if is_first else self._ways:
            parts = [place_examples(part, shapes[0].row_length) for part in layout.split(examples)]
            placed = [example for part in parts for example in part]
            if shape := fit_shape(shapes, placed):
                return layout, shape, placed
        raise AssertionError("every prompt has a row of its own in the last way")

    def _example(
        self, index: int, question: Question, tokens: Sequence[int], vectors: np.ndarray, rows: np.ndarray
    ) -> Example:
        prompts, passages = self._pipeline.prompts, self._pipeline.passages(rows)
        answer = prompts.answer(question.answers[0])
        groups = [passages[k : k + self._per_prompt] for k in range(0, len(passages), self._per_prompt)]
        built = [prompts.prompt(group, question.question, reserve=len(answer)) for group in groups]
        self.passages_cut.update(*(prompt.cut for prompt in built))
        return Example(index, tokens, vectors, [prompt.ids for prompt in built], answer)


def ways_of(layout: Layout, lengths: PromptLengths, packed: int) -> list[tuple[Layout, tuple[Shape, ...]]]:
    """How a step may be laid out, with its shapes, largest last: as it should be, and for what does not fit that."""
    shapes = choose_shapes(_some(lengths.sample, packed), lengths.answers, layout.size, lengths.longest, layout.parts)
    return [(layout, shapes), _cut(layout, packed, shapes[-1])]


def largest_first(ways: Sequence[tuple[Layout, tuple[Shape, ...]]]) -> list[tuple[Layout, tuple[Shape, ...]]]:
    """The same with their largest shapes alone, in the order of a phase's first step: one that does not fit into
    memory should be this one, not one in mid-run.
    """
    return sorted(((layout, shapes[-1:]) for layout, shapes in ways), key=lambda way: -way[1][0].rows)


def _cut(layout: Layout, prompts: int, largest: Shape) -> tuple[Layout, tuple[Shape]]:
    """How a step is done that does not fit the largest shape: in smaller micro-batches, each prompt in its own row.

    prompts: of each question, which stay together. Sums run over all micro-batches, so the step's result is the same;
    the rows of one are as many as the largest shape has, or as one question needs.
    """
    times = next((n for n in range(1, layout.size) if layout.cut(n).size * prompts <= largest.rows), layout.size)
    finer = layout.cut(times)
    return finer, (dataclasses.replace(largest, rows=finer.size * prompts),)


def prompt_work(size: ModelSize, examples: Sequence[Example], training: bool) -> Cost:
    """What reading the examples' prompts with their answers, or learning from them, is of the generator's work."""
    lengths = sequence_lengths([example.prompts for example in examples], [e.answer for e in examples])
    head = sum(len(example.answer) * len(example.prompts) for example in examples)
    return model_work(size, lengths, head, training)


def prompt_passages(config: RunConfig) -> int:
    """Passages in each prompt that is trained on."""
    return config.top_k if config.objective == "concat_nll" else 1


def check_prompts(pipeline: Pipeline, questions: Sequence[Question], per_prompt: int) -> None:
    """Raises UserError, naming it, where a question and its answer are too long for the generator's window."""
    for question in questions:
        pipeline.check_room(question, per_prompt, reserve=len(pipeline.prompts.answer(question.answers[0])))


def prompt_lengths(run: Run, side: QuestionSide, sampler: Sampler, per_prompt: int) -> PromptLengths:
    """Of prompts of `per_prompt` passages for a phase's questions.

    Passages that are found are longer or shorter than those of the corpus at random, as one data set has it or the
    other, so some questions are searched before training.
    """
    every = [*sampler.train, *sampler.dev]
    check_prompts(run.pipeline, every, per_prompt)
    return measured_lengths(run.config, run.pipeline.prompts, run.pipeline.store, every, side.tried(), per_prompt)


def measured_lengths(
    config: RunConfig,
    prompts: PromptBuilder,
    store: PassageStore,
    every: Sequence[Question],
    tried: tuple[Sequence[int], np.ndarray],
    per_prompt: int,
) -> PromptLengths:
    """`prompt_lengths` of the questions `every`.

    tried: places of some of them, and the rows [n, K] of the passages that each reads.
    """
    answers = [len(prompts.answer(question.answers[0])) for question in every]
    stride = -(-len(store) // _LENGTH_SAMPLE)
    passages = [len(prompts.passage(store[row])) for row in range(0, len(store), stride)]
    longest_passage = max(passages) if stride == 1 else config.max_passage_tokens
    frames = [prompts.frame_length(question.question, per_prompt) for question in every]
    longest = min(max(frames) + per_prompt * longest_passage + max(answers), prompts.window)
    sample = []
    for place, rows in zip(*tried, strict=True):
        read = [len(prompts.passage(store[int(row)])) for row in rows]
        groups = [sum(read[k : k + per_prompt]) for k in range(0, config.top_k - per_prompt + 1, per_prompt)]
        lengths = [min(frames[place] + group + answers[place] - 1, longest) for group in groups]
        sample.append(QuestionLengths(lengths, answers[place]))
    return PromptLengths(sample, min(frames), longest, answers)


def _some(sample: Sequence[QuestionLengths], count: int) -> list[QuestionLengths]:
    """So many prompts of each question, drawn under a seed that no flag moves: shapes belong to the data."""
    rng = np.random.default_rng(0)
    return [each._replace(prompts=rng.choice(each.prompts, count, replace=False).tolist()) for each in sample]
