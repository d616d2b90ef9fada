"""Evaluates a trained run, or two models as they are, on questions: answers, retrieval, and what that cost.

    python -m ragjax.evaluate --run_dir=runs/joint --split=test
    python -m ragjax.evaluate --run_dir=runs/joint --top_k=1,5,10 --decode=concat,rag_token
    python -m ragjax.evaluate --run_dir=runs/joint --paired_with=runs/generator
    python -m ragjax.evaluate --embedder=minilm --generator=smollm2-135m --data=FOLDER

Each pair of --top_k and --decode gets a file of predictions, one line a question, and a line in the table; the scores
with their intervals also stand in SPLIT.evaluation.json beside them. What is there already is not decoded again, and a
command that was stopped goes on where it was.
"""

from collections.abc import Sequence

from ragjax.commands import flags
from ragjax.config import DecodeConfig, EvaluateConfig

flags.define_flags(EvaluateConfig)
# Given as lists, by EvaluateConfig.
_LISTED = ("decode",)
flags.define_overrides(DecodeConfig, but=_LISTED)


def main(arguments: Sequence[str]) -> None:
    from ragjax.errors import UserError
    from ragjax.evaluation import evaluate_runs, print_evaluation

    if arguments:
        raise UserError(f"ragjax.evaluate takes flags only, not {arguments[0]!r}: see --help.")
    print_evaluation(evaluate_runs(flags.parsed(EvaluateConfig), flags.given(DecodeConfig, but=_LISTED)))


if __name__ == "__main__":
    flags.run_command(main)
