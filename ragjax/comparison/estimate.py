"""What runs will take, from a few seconds of their own work: time, disk and memory, before anything is trained.

A run's time is that of its parts: prompts that the generator reads and learns from, answers, measurements on the dev
questions. They are measured on random passages of the corpus, so no index is needed. As runs end, what they have really
taken corrects what is still to come.
"""

import dataclasses
import itertools
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ragjax.comparison.matrix import Planned
from ragjax.config import RunConfig
from ragjax.data.dataset import Dataset
from ragjax.data.questions import Passage, Question
from ragjax.pipeline import arrangement_of, prompt_builder, trained_collection
from ragjax.pretrained import Embedder, Generator
from ragjax.training.loop import measured_every
from ragjax.training.reuse import source_run
from ragjax.training.sampling import total_steps
from ragjax.training.strategies import Phase

# Training steps against forward passes over the same prompts: experiments/results/strategy_cost.hotpotqa.json.
_STEP_PER_FORWARD = 1 / 0.35
# The same where all weights are trained: 6N FLOPs a token instead of 4N (ragjax.costs).
_FULL_PER_ADAPTERS = 1.5
# Pairs that phase 2 scores, of those that the untrained embedder finds: in the same file, 6.4 of 5 with nine rates.
_PAIRS_SCORED = 1.3
# An embedder's step is its forward pass and twice that backward.
_EMBEDDER_STEP = 3.0
# What a phase leaves on the disk: checkpoints of the state and AdamW's two moments, and of the best state one more.
_COPIES_IN_CHECKPOINT = 3
# What it holds in memory: parameters, gradients, two moments.
_COPIES_HELD = 4
# Passages and questions to encode, prompts to read, questions to answer: seconds of a laptop's work.
_ENCODED, _READ, _ANSWERED = 64, 8, 2


@dataclasses.dataclass(frozen=True)
class Pace:
    """What one pair of models takes on this machine and this data."""

    passage_seconds: float  # to encode one
    prompts_seconds: float  # a question's K prompts with their answers, forward
    answer_seconds: float  # to answer a question as the runs decode; 0 with --decode=none
    question_seconds: float  # the embedder's forward pass over one
    trained_bytes: Mapping[str, int]  # float32 parameters that each model trains
    weight_bytes: int  # of both models as they are
    vector_bytes: int = 0  # of the passages' vectors in memory

    def phase_seconds(self, phase: Phase, config: RunConfig, dataset: Dataset) -> float:
        """Training and its measurements, by what the phase learns from."""
        batch_size = phase.batch_size(config)
        learnt = [question for question in dataset.train if phase.signal.learns_from(question)]
        steps = total_steps(config, len(learnt), batch_size)
        questions = steps * batch_size
        step = _EMBEDDER_STEP * self.question_seconds if "embedder" in phase.trains else 0.0
        if not phase.signal.reads_answers:
            return questions * step
        dev = min(config.dev_limit, len(dataset.dev))
        every = measured_every(config, steps)
        measurements = 1 + math.ceil(steps / every) if every else 0
        if "generator" in phase.trains:
            learning = _STEP_PER_FORWARD * (1.0 if config.lora_rank else _FULL_PER_ADAPTERS)
            if config.backward_passages:  # all prompts are read, and a share of them learnt from
                learning = 1.0 + learning * config.backward_passages / config.top_k
            step += self.prompts_seconds * learning
            return questions * step + measurements * dev * self.prompts_seconds
        scored = min(questions, len(learnt)) + (dev if measurements else 0)  # each pair once, dev's too
        return questions * step + scored * _PAIRS_SCORED * self.prompts_seconds

    def cell_seconds(self, cell: Planned, dataset: Dataset) -> float:
        """A cell's own training, and its answers after (those before are shared), or the latter alone for `none`."""
        own = [phase for phase in cell.phases if not source_run(cell.config, phase)]
        training = sum(
            self.phase_seconds(phase, cell.config, dataset) + self.refreshing_seconds(phase, cell.config, dataset)
            for phase in own
        )
        return training + self.answers_seconds(cell.config, dataset)

    def refreshing_seconds(self, phase: Phase, config: RunConfig, dataset: Dataset) -> float:
        """Encoding the passages anew: for measurements, between them, and when the embedder has been trained."""
        if not config.refresh_passages or "embedder" not in phase.trains:
            return 0.0
        learnt = sum(map(phase.signal.learns_from, dataset.train))
        steps = total_steps(config, learnt, phase.batch_size(config))
        asked, measured = config.refresh_passages, measured_every(config, steps)
        times = math.ceil(steps / measured) * ((measured - 1) // asked + 1) if measured else (steps - 1) // asked
        return (times + 1) * self.encode_seconds(dataset)

    def answers_seconds(self, config: RunConfig, dataset: Dataset) -> float:
        """One evaluation."""
        return len(getattr(dataset, config.eval_split)[: config.eval_limit or None]) * self.answer_seconds

    def encode_seconds(self, dataset: Dataset) -> float:
        return len(dataset.passages) * self.passage_seconds

    def cell_bytes(self, cell: Planned) -> int:
        """On the disk: checkpoints, nearly all of it."""
        config, kept = cell.config, cell.config.keep_checkpoints
        copies = _COPIES_IN_CHECKPOINT * kept + kept + 1
        weights = sum(
            (1 if source_run(config, phase) else copies) * self.trained_bytes[model]
            for phase in cell.phases
            for model in phase.trains
        )
        refreshed = [phase for phase in cell.phases if "embedder" in phase.trains and not source_run(config, phase)]
        return weights + (kept * self.vector_bytes * len(refreshed) if config.refresh_passages else 0)

    def memory_bytes(self, cells: Sequence[Planned]) -> int:
        """At least: weights, gradients and the optimizer. Activations come on top, by --batch_size and --remat."""
        phases = [phase for cell in cells for phase in cell.phases]
        states = [_COPIES_HELD * sum(self.trained_bytes[model] for model in phase.trains) for phase in phases]
        return self.weight_bytes + max(states, default=0)


def measure_pace(config: RunConfig, dataset: Dataset, embedder: Embedder, generator: Generator | None) -> Pace:
    """Lets both untrained models work for some seconds. A generator that is None takes no time."""
    draw = random.Random(0)
    rows = draw.sample(range(len(dataset.passages)), min(_ENCODED, len(dataset.passages)))
    passages = [dataset.passages[row] for row in rows]
    questions = draw.choices(dataset.train or dataset.test or dataset.dev, k=_READ)
    encoded = _seconds(lambda: embedder.encode_passages([passage.embedder_text for passage in passages]))
    asked = _seconds(lambda: embedder.encode_queries([question.question for question in questions]))
    read = answered = 0.0
    trained = {"embedder": embedder.params}
    if generator is not None:
        trained["generator"] = generator.variables[trained_collection(config)]
        read = _reading_seconds(config, generator, questions, passages)
        if config.decode != "none":
            answered = _answering_seconds(config, generator, questions[:_ANSWERED], passages)
    models = [embedder.params, generator and generator.variables]
    return Pace(
        passage_seconds=encoded / len(passages),
        prompts_seconds=read,
        answer_seconds=answered,
        question_seconds=asked / len(questions),
        trained_bytes={model: 4 * sum(leaf.size for leaf in jax.tree.leaves(tree)) for model, tree in trained.items()},
        weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(models)),
        vector_bytes=4 * len(dataset.passages) * embedder.width,
    )


def _reading_seconds(
    config: RunConfig, generator: Generator, questions: Sequence[Question], passages: Sequence[Passage]
) -> float:
    """Of the generator's forward pass over a question's K prompts."""
    builder = prompt_builder(config, generator)
    answers = [builder.answer(question.answers[0] if question.answers else "") for question in questions]
    prompts = [
        builder.prompt([passage], question.question, len(answer)).ids
        for question, passage, answer in zip(questions, itertools.cycle(passages), answers, strict=False)
    ]
    return _seconds(lambda: generator.score_tokens(prompts, answers)) / len(prompts) * config.top_k


def _answering_seconds(
    config: RunConfig, generator: Generator, questions: Sequence[Question], passages: Sequence[Passage]
) -> float:
    """Of an answer from K passages, decoded as the runs do."""
    builder, own = prompt_builder(config, generator), generator.prepared()
    read = list(itertools.islice(itertools.cycle(passages), config.top_k))
    groups = [read] if config.decode == "concat" else [[passage] for passage in read]
    prompts = [
        [builder.prompt(group, question.question, config.max_new_tokens).ids for group in groups]
        for question in questions
    ]
    weights = np.full((len(questions), len(groups)), -math.log(len(groups)))
    seconds = _seconds(lambda: own.decode_answers(prompts, weights, config, len(questions)))
    return seconds / len(questions) / arrangement_of(config).copies


def _seconds(work: Callable[[], Any]) -> float:
    """Of the second call: the first one compiles."""
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
