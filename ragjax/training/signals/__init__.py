"""Signals: what a phase learns from.

Signal       its assembler, the questions that it can use, the parts of its cost              signal.py
Assembler    what the training loop asks of each signal's assembler                           signal.py
Models       what a phase's objective is made of                                              signal.py
ANSWERS      the answers' likelihood, with the generator in the graph                         answers.py
             the same with a gradient through a few drawn passages                            drawn.py
LIKELIHOODS  the same under a frozen generator, each pair scored once and kept                likelihoods.py
POSITIVES    labelled passages against other passages (multiple negatives ranking)            positives.py
dev_questions, check_prompts, prompt_passages    which questions are used, and whether they fit    in signal.py and
             prompt_side.py

The embedder's half of a batch is the same for all of them: question_side.py. What has prompts in it packs them by
prompt_side.py.
"""

from ragjax.training.signals.answers import ANSWERS, AnswerAssembler
from ragjax.training.signals.drawn import DrawnAssembler
from ragjax.training.signals.likelihoods import LIKELIHOODS, LikelihoodAssembler
from ragjax.training.signals.positives import POSITIVES, RankingAssembler
from ragjax.training.signals.prompt_side import check_prompts, prompt_passages
from ragjax.training.signals.signal import (
    Assembled,
    Assembler,
    Models,
    Signal,
    StackableAssembler,
    dev_questions,
    model_work,
)

__all__ = [
    "ANSWERS",
    "LIKELIHOODS",
    "POSITIVES",
    "AnswerAssembler",
    "Assembled",
    "Assembler",
    "DrawnAssembler",
    "LikelihoodAssembler",
    "Models",
    "RankingAssembler",
    "Signal",
    "StackableAssembler",
    "check_prompts",
    "dev_questions",
    "model_work",
    "prompt_passages",
]
