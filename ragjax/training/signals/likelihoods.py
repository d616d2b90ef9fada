"""Learning from the answers under a frozen generator: the embedder alone moves, over likelihoods that are kept."""

from collections.abc import Mapping, Sequence

import numpy as np

from ragjax.arrays import ModelVariables
from ragjax.costs import Cost, Ledger
from ragjax.data.batches import ScoredBatch, ScoredExample, make_scored_batch
from ragjax.data.questions import Question
from ragjax.runs import Run
from ragjax.training.answer_scorer import AnswerScorer
from ragjax.training.likelihood_cache import LikelihoodCache
from ragjax.training.objectives import LeaveOneOutObjective, LikelihoodObjective
from ragjax.training.sampling import QuestionBatch
from ragjax.training.signals.prompt_side import prompt_lengths
from ragjax.training.signals.question_side import QuestionSide
from ragjax.training.signals.signal import Assembled, Models, Signal, answer_mixture, answer_sampler, every_question


class LikelihoodAssembler:
    """Batches with the frozen generator's answer log-probs: only the embedder runs inside the step."""

    def __init__(self, run: Run, trains: Sequence[str]):
        """The likelihoods are kept in the run's folder. trains: the models that are trained, ("embedder",)."""
        config = run.config
        self._pipeline = run.pipeline
        self.passages_cut: set[str] = set()
        self.sampler = answer_sampler(run)
        self._side = QuestionSide(run, self.sampler, moves=True)
        self.objective = likelihood_objective(run, trains)
        self._leaves_one_out = isinstance(self.objective, LeaveOneOutObjective)
        per_prompt = config.top_k - 1 if self._leaves_one_out else 1
        limits = prompt_lengths(run, self._side, self.sampler, per_prompt).limits()
        self._answer_length = limits.longest_answer
        self.likelihoods = LikelihoodCache(
            AnswerScorer(run.generator, limits, run.arrangement), run.files.likelihoods_file
        )

    @property
    def looks_ahead(self) -> bool:
        return False  # the embedder moves, and finds other passages

    @property
    def position(self) -> int:
        return self.likelihoods.position

    @property
    def pairs_scored(self) -> int:
        return len(self.likelihoods)

    def rewind(self, position: int) -> None:
        self.likelihoods.rewind(position)

    def assemble(self, batch: QuestionBatch, variables: ModelVariables, ledger: Ledger) -> Assembled:
        rows = self._side.retrieve(batch, variables, ledger).passage_rows
        scores, tokens = self.score(batch, [rows], variables, ledger)
        figures = {"generator_tokens": tokens, "distinct_passages": len(np.unique(rows))}
        work = {"embedder": self._side.work(batch, batch.training)}
        return Assembled(self.scored_batch(batch, rows, scores), work, figures, rows)

    def assemble_stacked(
        self, batch: QuestionBatch, variables: ModelVariables, copies: int, ledger: Ledger
    ) -> tuple[list[ScoredBatch], Cost]:
        """A batch for each copy of the embedder, and the work that one of them is in a step."""
        alternatives = self._side.retrieve_stacked(batch, variables, copies, ledger)
        scores, _ = self.score(batch, list(alternatives), variables, ledger)
        batches = [self.scored_batch(batch, rows, scores) for rows in alternatives]
        return batches, self._side.work(batch, batch.training)

    def contexts(self, rows: np.ndarray) -> list[tuple[int, ...]]:
        """What each of a question's passages [K] is judged by: itself alone, or all the others, best first."""
        every = tuple(rows.tolist())
        if self._leaves_one_out:
            return [every[:k] + every[k + 1 :] for k in range(len(every))]
        return [(row,) for row in every]

    def score(
        self, batch: QuestionBatch, alternatives: Sequence[np.ndarray], variables: ModelVariables, ledger: Ledger
    ) -> tuple[dict[tuple[int, tuple[int, ...]], np.ndarray], int]:
        """The answers' log-probs in the contexts of each of the questions' passages, alternatives [b, K] each.

        Returns:
          {(question's place in the batch, rows of the passages in the prompt): [T_i]}, and the tokens that the
          generator read for it: only pairs that are new are scored.
        """
        prompts, questions = self._pipeline.prompts, batch.questions
        pairs = sorted(
            {
                (i, context)
                for rows in alternatives
                for i, chosen in enumerate(rows)
                for context in self.contexts(chosen)
            }
        )
        answers = [self._answer(questions[i]) for i, _ in pairs]
        built = [
            prompts.prompt(self._pipeline.passages(context), questions[i].question, reserve=len(answer))
            for (i, context), answer in zip(pairs, answers, strict=True)
        ]
        self.passages_cut.update(*(prompt.cut for prompt in built))
        ids = [prompt.ids for prompt in built]
        scores, cost = self.likelihoods.score(variables["generator"], ids, answers)
        ledger.add("generator", cost)
        return dict(zip(pairs, scores, strict=True)), cost.tokens

    def scored_batch(
        self,
        batch: QuestionBatch,
        rows: np.ndarray,
        scores: Mapping[tuple[int, tuple[int, ...]], np.ndarray],
    ) -> ScoredBatch:
        """[groups, micro-batches, ...] of the questions under the given passages [b, K], whose `score` is given."""
        vectors = self._pipeline.retriever.vectors.vectors_of(rows)
        examples = [
            ScoredExample(
                batch.tokens[i], vectors[i], np.stack([scores[i, context] for context in self.contexts(chosen)])
            )
            for i, chosen in enumerate(rows)
        ]
        return self._side.layout.stack(examples, self._make)

    def _answer(self, question: Question) -> list[int]:
        return self._pipeline.prompts.answer(question.answers[0])

    def _make(self, examples: Sequence[ScoredExample]) -> ScoredBatch:
        return make_scored_batch(examples, self._answer_length, self._side.layout.size, self._side.question_length)


def likelihood_objective(models: Models, trains: Sequence[str]) -> LikelihoodObjective | LeaveOneOutObjective:
    """What the configuration's --objective and --retriever_objective minimise."""
    config, embedder = models.config, models.embedder.module
    if config.retriever_objective == "loop":
        return LeaveOneOutObjective(embedder, config.score_scale, config.retriever_temperature)
    return LikelihoodObjective(embedder, answer_mixture(config, trains))


LIKELIHOODS = Signal(
    "likelihoods",
    LikelihoodAssembler,
    likelihood_objective,
    learns_from=every_question,
    reads_answers=True,
    batch_size_flag="batch_size",
    flags=("objective", "loss_reduction", "dev_limit"),
    cost_parts={("embedder",): ("generator_forward", "embedder_train", "search")},
    scores_once=True,
)
