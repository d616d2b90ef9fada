"""Learning from the answers, with the generator in the graph: retrieval, prompts and answers, packed into rows."""

from collections.abc import Sequence

import numpy as np

from ragjax.arrays import ModelVariables
from ragjax.costs import Ledger
from ragjax.data.batches import Batch, Example, make_batch
from ragjax.runs import Run
from ragjax.training.objectives import AnswerObjective, ConcatenatedObjective, Objective
from ragjax.training.sampling import QuestionBatch
from ragjax.training.signals.drawn import DrawnAssembler, drawn_objective
from ragjax.training.signals.prompt_side import PromptSide, prompt_lengths, prompt_passages, prompt_work
from ragjax.training.signals.question_side import QuestionSide
from ragjax.training.signals.signal import (
    Assembled,
    Models,
    NoCache,
    Signal,
    answer_mixture,
    answer_sampler,
    every_question,
)


class AnswerAssembler(NoCache):
    """Batches with prompts and answers: the generator runs inside the step."""

    def __init__(self, run: Run, trains: Sequence[str]):
        """trains: the models that are trained, of "embedder" and "generator"."""
        config = run.config
        self._trains, self._generator = trains, run.generator
        self.sampler = answer_sampler(run)
        self._questions = QuestionSide(run, self.sampler, moves="embedder" in trains)
        self._per_prompt = prompt_passages(config)
        lengths = prompt_lengths(run, self._questions, self.sampler, self._per_prompt)
        prompts = config.top_k // self._per_prompt  # of each question
        self._prompts = PromptSide(run, self._questions.layout, lengths, self._per_prompt, prompts)
        self.objective = answer_objective(run, trains)

    @property
    def passages_cut(self) -> set[str]:
        return self._prompts.passages_cut

    @property
    def looks_ahead(self) -> bool:
        return "embedder" not in self._trains

    def assemble(self, batch: QuestionBatch, variables: ModelVariables, ledger: Ledger) -> Assembled:
        return self.with_passages(batch, self._questions.retrieve(batch, variables, ledger).passage_rows)

    def with_passages(self, batch: QuestionBatch, rows: np.ndarray) -> Assembled:
        """The batch of questions under the given passages [b, K] (row numbers, best first)."""
        examples = self._prompts.examples(batch, rows)
        layout, shape, examples = self._prompts.lay_out(examples, is_first=batch.training and batch.step == 0)

        def make(part: Sequence[Example]) -> Batch:
            return make_batch(part, shape, layout.size, self._questions.question_length)

        work = {"generator": prompt_work(self._generator.size, examples, self._learns("generator", batch))}
        if self._per_prompt == 1:
            work["embedder"] = self._questions.work(batch, self._learns("embedder", batch))
        figures = {"generator_tokens": work["generator"].tokens, "distinct_passages": len(np.unique(rows))}
        return Assembled(layout.stack(examples, make), work, figures, rows)

    def _learns(self, model: str, batch: QuestionBatch) -> bool:
        return batch.training and model in self._trains


def answer_objective(models: Models, trains: Sequence[str]) -> AnswerObjective | ConcatenatedObjective:
    """What the configuration's --objective minimises."""
    config, dropout = models.config, models.config.lora_dropout > 0
    if config.objective == "concat_nll":
        return ConcatenatedObjective(models.generator.module, dropout)
    return AnswerObjective(models.embedder.module, models.generator.module, answer_mixture(config, trains), dropout)


def make_assembler(run: Run, trains: Sequence[str]) -> AnswerAssembler | DrawnAssembler:
    """The assembler that the configuration's --backward_passages asks for."""
    return DrawnAssembler(run, trains) if run.config.backward_passages else AnswerAssembler(run, trains)


def make_objective(models: Models, trains: Sequence[str]) -> Objective:
    """The objective of that assembler."""
    return (drawn_objective if models.config.backward_passages else answer_objective)(models, trains)


ANSWERS = Signal(
    "answers",
    make_assembler,
    make_objective,
    learns_from=every_question,
    reads_answers=True,
    batch_size_flag="batch_size",
    flags=("objective", "loss_reduction", "dev_limit"),
    cost_parts={
        ("generator",): ("generator_train", "embedder_forward", "search"),
        ("embedder", "generator"): ("generator_train", "embedder_train", "search"),
    },
)
