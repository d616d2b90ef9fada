"""A frozen generator's answer log-probabilities: each (question, passage) pair is scored once and kept.

While the generator is frozen, log p(y_t | x, z, y_<t) is a constant, so training the embedder needs one forward pass a
pair and no backward pass; later epochs, and other learning rates, find most of their pairs here.

A key is made of what decides the value: the prompt's tokens (so question, passage, template and truncation), the
answer's, and the generator (source, adapters, how it is stored and computed). Values are those of any batch in which
the pair is scored, up to rounding. So that a run which was killed repeats them bit for bit, a batch is kept whole or
not at all, and the file belongs to one run.
"""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ragjax.arrays import Ids, Variables
from ragjax.costs import Cost, forward_flops
from ragjax.data.batches import sequence_lengths
from ragjax.files import KeyedRecords
from ragjax.parallel import check_same
from ragjax.training.answer_scorer import AnswerScorer


class LikelihoodCache:
    """What a scorer says of one generator's pairs, kept in a file."""

    def __init__(self, scorer: AnswerScorer, path: Path):
        """path: the file they are kept in (.jsonl)."""
        self._scorer = scorer
        self._context = scorer.generator.key
        self._records = KeyedRecords(path)
        check_same(f"likelihoods of {path}", self._records.lines)  # before the first adds to them

    def __len__(self) -> int:
        """Pairs that were scored so far, in this process and before."""
        return len(self._records)

    @property
    def position(self) -> int:
        """How much has been kept so far: what `rewind` takes."""
        return self._records.lines

    def rewind(self, position: int) -> None:
        """Forgets what was kept after `position`, so that a run that resumes there scores it again."""
        self._records.rewind(position)

    def score(
        self, variables: Variables, prompts: Sequence[Ids], answers: Sequence[Ids]
    ) -> tuple[list[np.ndarray], Cost]:
        """`AnswerScorer.score`, and what the new pairs among these have cost.

        variables: those of the scorer's generator, placed.
        """
        began = time.perf_counter()
        keys = [self._key(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        missing = list({key: i for i, key in enumerate(keys) if key not in self._records}.values())
        lengths: list[int] = []
        if missing:
            chosen_prompts, chosen_answers = [prompts[i] for i in missing], [answers[i] for i in missing]
            values = self._scorer.score(variables, chosen_prompts, chosen_answers)
            self._records.add({keys[i]: value.tolist() for i, value in zip(missing, values, strict=True)})
            lengths = sequence_lengths([[prompt] for prompt in chosen_prompts], chosen_answers)
        found = [np.asarray(self._records[key], np.float32) for key in keys]
        head = sum(len(answers[i]) for i in missing)
        flops = forward_flops(self._scorer.generator.size, lengths, head)
        return found, Cost(time.perf_counter() - began, flops, sum(lengths))

    def _key(self, prompt: Ids, answer: Ids) -> str:
        digest = hashlib.sha256(self._context.encode())
        for ids in (prompt, answer):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(np.asarray(ids, np.int64).tobytes())
        return digest.hexdigest()[:32]
