"""Evaluates a trained run, or two untrained models, on questions: answers, retrieval and cost.

    python -m ragjax.evaluate --run_dir=runs/joint --split=test
    python -m ragjax.evaluate --run_dir=runs/joint --top_k=1,5,10 --decode=concat,rag_token
    python -m ragjax.evaluate --run_dir=runs/joint --paired_with=runs/generator
    python -m ragjax.evaluate --run_dir=runs/joint --retriever=hybrid --decode=none
    python -m ragjax.evaluate --embedder=minilm --generator=smollm2-135m --data=FOLDER

Each pair of --top_k and --decode gets a line in the table and a file of predictions, with one line per question. The
scores and their intervals are also written to SPLIT.evaluation.json beside them. Predictions that exist already are not
decoded again: run a stopped command once more to continue it.
"""

from collections.abc import Sequence

from ragjax.commands import flags
from ragjax.config import DecodeConfig, EvaluateConfig, RetrievalConfig

flags.define_flags(EvaluateConfig)
# Given as lists, by EvaluateConfig.
_LISTED = ("decode",)
flags.define_overrides(DecodeConfig, but=_LISTED)
flags.define_overrides(RetrievalConfig)


def main(arguments: Sequence[str]) -> None:
    from ragjax.errors import UserError
    from ragjax.evaluation import evaluate_runs, print_evaluation

    if arguments:
        raise UserError(f"ragjax.evaluate takes flags only, not {arguments[0]!r}: see --help.")
    overrides = flags.given(DecodeConfig, but=_LISTED) | flags.given(RetrievalConfig)
    print_evaluation(evaluate_runs(flags.parsed(EvaluateConfig), overrides))


if __name__ == "__main__":
    flags.run_command(main)
