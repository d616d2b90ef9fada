"""Asking: an answer, how likely it is, and what each passage has to do with it."""

import dataclasses
from collections.abc import Callable

import numpy as np

from ragjax.config import RunConfig
from ragjax.data.questions import Passage
from ragjax.generation import can_stream, stream_answer
from ragjax.pipeline import Pipeline, probabilities


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer and what it rests on."""

    text: str
    probability: float  # p(y|x) of the answer and its end: its decoder's model's (of rag_sequence, under all passages)
    passages: list[Passage]  # best first
    probabilities: np.ndarray  # [K], p(z|x)
    posterior: np.ndarray  # [K], p(z|x,y), proportional to p(z|x) p(y|x,z)


def ask(pipeline: Pipeline, question: str, config: RunConfig, show: Callable[[str], None] | None = None) -> Answer:
    """Answers a question.

    Args:
      pipeline: what answers.
      question: its text.
      config: top_k, score_scale, and how the answer is decoded.
      show: called with the text so far, each time that it has grown.

    Raises:
      UserError: top_k is larger than the corpus, or the question too long for the generator's window.
    """
    generator = pipeline.generator
    if config.decode == "none":  # the run has measured retrieval alone
        config = dataclasses.replace(config, decode="concat")
    pipeline.check_top_k(config.top_k)
    retrieved = pipeline.retrieve([question], config.top_k)
    passage_rows, scores = retrieved.passage_rows[0], retrieved.scores[0]
    prompts, log_weights = pipeline.decoding_prompts(question, passage_rows, scores, config)
    read = [prompt.ids for prompt in prompts]
    text = pipeline.prediction(_decode(pipeline, read, log_weights, config, show))
    if show is not None:
        show(text)
    answer = generator.answer_ids(text)
    one_by_one = dataclasses.replace(config, decode="rag_sequence")
    alone, log_shares = pipeline.decoding_prompts(question, passage_rows, scores, one_by_one)
    scored = generator.score_tokens([prompt.ids for prompt in alone], [answer] * len(alone))
    under = np.array(scored, np.float64)  # [K, T]
    shares, log_joint = np.exp(log_shares), log_shares + under.sum(axis=1)  # p(z|x) and log p(z|x) p(y|x,z)
    if config.decode == "concat":
        probability = np.exp(generator.score_tokens(read, [answer])[0].sum(dtype=np.float64))
    elif config.decode == "rag_token":
        probability = np.prod(shares @ np.exp(under))
    else:
        probability = np.exp(log_joint).sum()
    return Answer(
        text, float(probability), pipeline.passages(passage_rows), shares, probabilities(log_joint, scale=1.0)
    )


def _decode(
    pipeline: Pipeline,
    prompts: list[list[int]],
    log_weights: np.ndarray,
    config: RunConfig,
    show: Callable[[str], None] | None,
) -> list[int]:
    """The answer's tokens; where they can be streamed, its text is shown as it grows."""
    if show is None or not can_stream(config):
        (decoded,) = pipeline.generator.prepared().decode_answers([prompts], log_weights[None], config, 1)
        return decoded.tokens
    new_tokens: list[int] = []
    for new_tokens in stream_answer(pipeline.generator, prompts, log_weights, config):
        show(pipeline.prediction(new_tokens))
    return new_tokens
