"""Learning from the answers with a gradient through a few drawn passages of each question (--backward_passages).

A step reads the prompts of all K passages once, forward only, as `AnswerScorer` packs them, so nothing is kept for a
backward pass. The draw follows on the host, which packs the prompts of the m drawn passages for the compiled step.
Measurements on the dev questions end with the first part, and are exact.
"""

import time
from collections.abc import Sequence

import numpy as np

from ragjax.arrays import ModelVariables, Variables
from ragjax.costs import Cost, Ledger
from ragjax.data.batches import (
    DrawnBatch,
    Example,
    ScoredBatch,
    ScoredExample,
    Shape,
    fill_up,
    make_example_rows,
    make_scored_batch,
)
from ragjax.runs import Run
from ragjax.training.answer_scorer import AnswerScorer
from ragjax.training.draws import Draw, answer_shares, draw_passages
from ragjax.training.objectives import DrawnObjective
from ragjax.training.sampling import QuestionBatch
from ragjax.training.signals.prompt_side import PromptSide, prompt_lengths, prompt_work
from ragjax.training.signals.question_side import QuestionSide
from ragjax.training.signals.signal import Assembled, Models, NoCache, answer_mixture, answer_sampler

# A question of a step: the prompts that were drawn, the scores of all, the draw.
_Part = tuple[Example, ScoredExample, Draw]


class DrawnAssembler(NoCache):
    """Batches with the answers' log-probs under all passages, and rows for the passages that go backward."""

    def __init__(self, run: Run, trains: Sequence[str]):
        """trains: the models that are trained, the generator among them."""
        self._config, self._generator = run.config, run.generator
        self._moves = "embedder" in trains
        self.sampler = answer_sampler(run)
        self._questions = QuestionSide(run, self.sampler, self._moves)
        lengths = prompt_lengths(run, self._questions, self.sampler, per_prompt=1)
        self._prompts = PromptSide(run, self._questions.layout, lengths, 1, run.config.backward_passages)
        limits = lengths.limits()
        self._longest_answer = limits.longest_answer
        self._scorer = AnswerScorer(run.generator, limits, run.arrangement)
        self.objective = drawn_objective(run, trains)

    @property
    def passages_cut(self) -> set[str]:
        return self._prompts.passages_cut

    @property
    def looks_ahead(self) -> bool:
        return False  # the draw is by what the generator says now

    def assemble(self, batch: QuestionBatch, variables: ModelVariables, ledger: Ledger) -> Assembled:
        found = self._questions.retrieve(batch, variables, ledger)
        examples = self._prompts.examples(batch, found.passage_rows)
        began, read = time.perf_counter(), prompt_work(self._generator.size, examples, training=False)
        scored = self._score(examples, variables["generator"])
        ledger.add("generator", read + Cost(time.perf_counter() - began))
        work = {"embedder": self._questions.work(batch, batch.training and self._moves)}
        if batch.training:
            draws = [
                self._draw(batch.step, index, doc_scores, example.scores)
                for index, doc_scores, example in zip(batch.indices, found.scores, scored, strict=True)
            ]
            made, work["generator"] = self._drawn(examples, scored, draws, is_first=batch.step == 0)
        else:
            made = self._questions.layout.stack(scored, self._make_scored)
        figures = {"generator_tokens": read.tokens, "distinct_passages": len(np.unique(found.passage_rows))}
        return Assembled(made, work, figures, found.passage_rows)

    def _score(self, examples: Sequence[Example], variables: Variables) -> list[ScoredExample]:
        """Every prompt's answer, forward only."""
        prompts = [prompt for example in examples for prompt in example.prompts]
        answers = [example.answer for example in examples for _ in example.prompts]
        found = iter(self._scorer.score(variables, prompts, answers))
        return [
            ScoredExample(e.question_tokens, e.passage_vectors, np.stack([next(found) for _ in e.prompts]))
            for e in examples
        ]

    def _draw(self, step: int, index: int, doc_scores: np.ndarray, scores: np.ndarray) -> Draw:
        """Of a question, by its place in its split: neither its batch nor a device has a part in the random number."""
        config = self._config
        shares = answer_shares(config.objective, config.score_scale * doc_scores, scores)
        return draw_passages(shares, config.backward_passages, (config.seed, step, index))

    def _drawn(
        self, examples: Sequence[Example], scored: Sequence[ScoredExample], draws: Sequence[Draw], is_first: bool
    ) -> tuple[DrawnBatch, Cost]:
        """The step's batch, and its work."""
        chosen = [
            example._replace(prompts=[example.prompts[k] for k in draw.passages])
            for example, draw in zip(examples, draws, strict=True)
        ]
        layout, shape, chosen = self._prompts.lay_out(chosen, is_first)
        parts = list(zip(chosen, scored, draws, strict=True))
        made = layout.stack(parts, lambda part: self._make_drawn(part, shape, layout.size))
        return made, prompt_work(self._generator.size, chosen, training=True)

    def _make_drawn(self, parts: Sequence[_Part], shape: Shape, size: int) -> DrawnBatch:
        examples, scored, draws = zip(*parts, strict=True)
        return DrawnBatch(
            make_scored_batch(scored, shape.answer_length, size, self._questions.question_length),
            make_example_rows(examples, shape, size),
            fill_up([draw.passages for draw in draws], size),
            fill_up([draw.weights for draw in draws], size),
        )

    def _make_scored(self, scored: Sequence[ScoredExample]) -> ScoredBatch:
        size, question_length = self._questions.layout.size, self._questions.question_length
        return make_scored_batch(scored, self._longest_answer, size, question_length)


def drawn_objective(models: Models, trains: Sequence[str]) -> DrawnObjective:
    """What is minimised through the drawn passages."""
    return DrawnObjective(models.embedder.module, models.generator.module, answer_mixture(models.config, trains))
