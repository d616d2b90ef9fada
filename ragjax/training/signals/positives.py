"""Learning from labelled passages by multiple negatives ranking: the question's positive among the step's passages.

No gradient reaches passage vectors, so a step's candidates are plain numbers that every group and micro-batch gets in
full: the loss depends neither on the number of groups nor on how the step is split, and a larger batch costs the
question side only.
"""

import dataclasses
import itertools
import unicodedata
from collections.abc import Sequence

import numpy as np

from ragjax.arrays import ModelVariables
from ragjax.costs import Cost, Ledger
from ragjax.data.batches import RankingBatch, pad_tokens
from ragjax.data.questions import Passage, Question
from ragjax.errors import UserError
from ragjax.retrieval import Queries, at_first
from ragjax.runs import Run
from ragjax.training.health import WATCHED
from ragjax.training.objectives import RankingObjective
from ragjax.training.sampling import QuestionBatch, Sampler
from ragjax.training.signals.question_side import QuestionSide
from ragjax.training.signals.signal import Assembled, Models, NoCache, Signal

# How much deeper than it would have to be hard negatives are looked for.
_MINED = 100


@dataclasses.dataclass(frozen=True)
class _Labelled:
    """What is fixed about a labelled question."""

    choices: Sequence[int]  # rows of its labelled passages, in order
    texts: frozenset[str]  # what those say
    hard: Sequence[int]  # rows of its hard negatives
    guide: np.ndarray  # [E], the untrained embedder's question vector


class RankingAssembler(NoCache):
    """Batches of labelled questions; the unlabelled ones are skipped."""

    def __init__(self, run: Run, trains: Sequence[str] = ("embedder",)):
        """Raises UserError where no training question is labelled, or more hard negatives are asked for than exist."""
        config, pipeline, dataset = run.config, run.pipeline, run.dataset
        self._config, self._pipeline = config, pipeline
        self._untrained = at_first(pipeline.retriever.vectors)
        self.passages_cut: set[str] = set()  # it builds no prompts
        train = list(filter(is_labelled, dataset.train))
        if not train:
            raise UserError(
                f"no training question of {dataset.name} has positive_ids, which --strategy={config.strategy} learns "
                "from: label some, or choose --strategy=two_phase."
            )
        # No generator reads them, so all can be measured.
        dev = [] if config.dev_every == 0 else list(filter(is_labelled, dataset.dev[:WATCHED]))
        self.sampler = Sampler(train, dev, config.ranking_batch_size, config.seed, run.embedder.query_tokens)
        self.objective = ranking_objective(run)
        self._side = QuestionSide(run, self.sampler, moves=True)
        self._texts: dict[int, str] = {}
        # Ids are unique within a split only.
        self._known = {"train": self._describe(train), "dev": self._describe(dev)}

    def _describe(self, questions: Sequence[Question]) -> list[_Labelled]:
        """Each question's positives and hard negatives. Hard negatives and the filter are the untrained embedder's."""
        if not questions:
            return []
        pipeline = self._pipeline
        choices = [sorted(pipeline.store.rows_of(question.positive_ids).tolist()) for question in questions]
        texts = [frozenset(map(self._text_of, rows)) for rows in choices]
        guides = pipeline.embedder.encode_queries([question.question for question in questions])
        hard = self._find_hard_negatives(questions, guides, choices, texts)
        return [_Labelled(*parts) for parts in zip(choices, texts, hard, guides, strict=True)]

    def _find_hard_negatives(
        self,
        questions: Sequence[Question],
        guides: np.ndarray,
        choices: Sequence[Sequence[int]],
        texts: Sequence[frozenset[str]],
    ) -> list[list[int]]:
        """Rows of the passages nearest to each question that are negatives of all its positives; fewer where the
        nearest hundred hold fewer.
        """
        wanted, most = self._config.hard_negatives, max(map(len, choices))
        if not wanted:
            return [[] for _ in questions]
        if wanted + most > (passages := len(self._pipeline.store)):
            raise UserError(
                f"--hard_negatives={wanted} are more than the {passages} passages hold besides the positives: lower it."
            )
        queries = Queries([question.question for question in questions], guides)
        found = self._pipeline.retriever.retrieve(queries, min(wanted + most + _MINED, passages))
        vectors_of, hard = self._untrained.vectors_of, []
        own_scores = [
            vectors_of(np.asarray(rows)).astype(np.float64) @ guide.astype(np.float64)
            for guide, rows in zip(guides, choices, strict=True)
        ]
        limits = [self._limits(scores).min() for scores in own_scores]
        for rows, scores, limit, own, said in zip(
            found.passage_rows, found.scores, limits, choices, texts, strict=True
        ):
            near = [int(row) for row, score in zip(rows, scores, strict=True) if score <= limit and row not in own]
            hard.append(list(itertools.islice((row for row in near if self._text_of(row) not in said), wanted)))
        return hard

    def _limits(self, own: np.ndarray) -> np.ndarray:
        """The scores above which a passage is no negative of positives with these scores (the untrained embedder's)."""
        if self._config.negative_filter != "gist":
            return np.full_like(own, np.inf)
        return own - self._config.negative_margin * np.abs(own)

    @property
    def looks_ahead(self) -> bool:
        return True  # the passages are those of the labels, and were found before

    def assemble(self, batch: QuestionBatch, variables: ModelVariables, ledger: Ledger) -> Assembled:
        questions, tokens, layout = batch.questions, batch.tokens, self._side.layout
        known = [self._known["train" if batch.training else "dev"][i] for i in batch.indices]
        epoch = self.sampler.epoch(batch.step) if batch.training else 0
        positives = [self._positive(question, each, epoch) for question, each in zip(questions, known, strict=True)]
        candidates = np.asarray([*positives, *(row for each in known for row in each.hard)], np.int64)
        # One shape for every step, the last one of an epoch too.
        size = self.sampler.batch_size * (1 + self._config.hard_negatives)
        vectors = self._pipeline.retriever.vectors.vectors_of(candidates)
        mask = np.zeros((len(questions), size), bool)
        mask[:, : len(candidates)] = self._is_negative(known, candidates)
        padded = np.zeros((size, vectors.shape[1]), np.float32)
        padded[: len(candidates)] = vectors

        def make(places: Sequence[int]) -> RankingBatch:
            filled = np.zeros((layout.size, size), bool)
            filled[: len(places)] = mask[places]
            labels = np.zeros(layout.size, np.int32)
            labels[: len(places)] = places
            question_tokens, lengths = pad_tokens(
                [tokens[place] for place in places], layout.size, self._side.question_length
            )
            return RankingBatch(question_tokens, lengths, padded, labels, filled)

        stacked = layout.stack(list(range(len(questions))), make)
        work = {"embedder": self._side.work(batch, batch.training)}
        return Assembled(stacked, work, {"candidates": len(set(candidates.tolist()))})

    def assemble_stacked(
        self, batch: QuestionBatch, variables: ModelVariables, copies: int, ledger: Ledger
    ) -> tuple[list[RankingBatch], Cost]:
        """The same batch for each copy of the embedder, and the work that one of them is in a step."""
        assembled = self.assemble(batch, variables, ledger)
        return [assembled.batch] * copies, assembled.work["embedder"]

    def _positive(self, question: Question, known: _Labelled, epoch: int) -> int:
        """The one labelled passage of this epoch, drawn by seed."""
        draw = np.random.default_rng((self._config.seed, epoch, *question.id.encode()))
        return known.choices[int(draw.integers(len(known.choices)))]

    def _is_negative(self, known: Sequence[_Labelled], candidates: np.ndarray) -> np.ndarray:
        """[b, P]: whether a candidate counts as a negative of a question; the first b are the positives."""
        said = [self._text_of(row) for row in candidates.tolist()]
        negative = np.array([[text not in each.texts for text in said] for each in known])
        guides = np.stack([each.guide for each in known]).astype(np.float64)
        scores = guides @ self._untrained.vectors_of(candidates).astype(np.float64).T
        return negative & (scores <= self._limits(np.diagonal(scores))[:, None])

    def _text_of(self, row: int) -> str:
        """What a passage says: equal texts are the same passage under other ids, and no negatives of each other."""
        if row not in self._texts:
            self._texts[row] = normalised_text(self._pipeline.store[row])
        return self._texts[row]


def normalised_text(passage: Passage) -> str:
    """A passage's text (its title where it has none) without differences of case, spacing and Unicode form."""
    text = unicodedata.normalize("NFKC", passage.text or passage.title)
    return " ".join(text.casefold().split())


def is_labelled(question: Question) -> bool:
    """Whether passages that answer the question are known."""
    return bool(question.positive_ids)


def ranking_objective(models: Models, trains: Sequence[str] = ("embedder",)) -> RankingObjective:
    """Of the embedder alone."""
    return RankingObjective(models.embedder.module, models.config.ranking_scale)


POSITIVES = Signal(
    "positives",
    RankingAssembler,
    ranking_objective,
    learns_from=is_labelled,
    reads_answers=False,
    batch_size_flag="ranking_batch_size",
    flags=("ranking_scale", "hard_negatives", "negative_filter", "negative_margin"),
    cost_parts={("embedder",): ("embedder_train",)},
)
