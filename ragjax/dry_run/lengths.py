"""How long questions, prompts and answers are: by the data and the tokenizers where both are here, else assumed.

The passages that a question finds are not known before the embedder and the index are: prompts are measured under
passages of the corpus at random. Found ones are longer or shorter by some, as one data set has it or the other.
"""

import functools
from typing import NamedTuple

import numpy as np

from ragjax.config import RunConfig
from ragjax.data.batches import QuestionLengths, round_up
from ragjax.data.dataset import Dataset, load_dataset
from ragjax.data.sources.opening import find_folder
from ragjax.pipeline import prompt_builder
from ragjax.pretrained import Embedder, Generator
from ragjax.training.signals import dev_questions
from ragjax.training.signals.prompt_side import PromptLengths, measured_lengths
from ragjax.training.signals.question_side import tried_places

# Where there is nothing to measure: tokens of a question as the embedder reads it, of a prompt's instruction and
# question, of an answer.
_QUESTION, _FRAME, _ANSWER = 64, 96, 16


class Lengths(NamedTuple):
    """In tokens."""

    question: int  # W, padding included
    prompts: PromptLengths | None  # None: no phase reads any
    remarks: tuple[str, ...]  # what was measured and what was assumed


def find_lengths(config: RunConfig, embedder: Embedder, reader: Generator | None, per_prompt: int) -> Lengths:
    """Of a phase's texts.

    Args:
      config: names the data, which are read only where they are a folder here.
      embedder, reader: their tokenizers may be None. A reader that is None reads no prompts.
      per_prompt: passages in each prompt.

    Raises:
      UserError: the data here are damaged, or a question is longer than the generator's window.
    """
    dataset = local_data(config.data)
    missing = "no data are here" if dataset is None else "its tokenizer is not here"
    if dataset is None or embedder.tokenizer is None:
        question = min(_QUESTION, embedder.max_seq_length)
        remarks = [f"questions of {question} tokens are assumed, as {missing}"]
    else:
        dev = dataset.dev if reader is None else dev_questions(config, dataset)
        asked = [question.question for question in (*dataset.train, *dev)]
        question = round_up(max(map(len, embedder.query_tokens(asked))), 8)
        remarks = [f"questions are those of {dataset.name}"]
    if reader is None:
        return Lengths(question, None, tuple(remarks))
    if dataset is None or reader.tokenizer is None:
        prompts = _assumed(config, reader.config.max_position_embeddings, per_prompt)
        remarks.append(f"prompts of {prompts.longest} tokens with their answers of {_ANSWER} are assumed, as {missing}")
    else:
        prompts = _measured(config, dataset, reader, per_prompt)
        remarks.append(f"prompts have passages of {dataset.name} at random, and those found may be longer")
    return Lengths(question, prompts, tuple(remarks))


@functools.cache  # several configurations are tried out on them
def local_data(name: str) -> Dataset | None:
    """The data of a name that is a folder here, or the sample's; None for what would be fetched."""
    return None if find_folder(name) is None else load_dataset(name)


def _assumed(config: RunConfig, window: int, per_prompt: int) -> PromptLengths:
    length = min(_FRAME + per_prompt * config.max_passage_tokens + _ANSWER, window)
    sample = [QuestionLengths([length] * (config.top_k // per_prompt), _ANSWER)]
    return PromptLengths(sample, min(_FRAME, length), length, [_ANSWER])


def _measured(config: RunConfig, dataset: Dataset, reader: Generator, per_prompt: int) -> PromptLengths:
    prompts = prompt_builder(config, reader, stores=False)
    train, store = dataset.train, dataset.passages
    for question in train:
        prompts.room(question.question, per_prompt, len(prompts.answer(question.answers[0])))
    tried = tried_places(range(len(train)))
    rows = np.random.default_rng(0).integers(len(store), size=(len(tried), config.top_k))
    return measured_lengths(
        config, prompts, store, [*train, *dev_questions(config, dataset)], (tried, rows), per_prompt
    )
