"""Evaluates a trained run on a split: EM, F1, containment, Recall@5, hit@5 and what the evaluation cost.

    python -m ragjax.evaluate --run_dir=runs/joint --split=test

Predictions go to <run_dir>/predictions/<split>.after.jsonl, or to --predictions.
"""

from collections.abc import Sequence

from absl import flags as absl_flags

from ragjax import flags

_RUN_DIR = absl_flags.DEFINE_string("run_dir", "runs/joint", "Folder of a ragjax.train run.")
_SPLIT = absl_flags.DEFINE_enum("split", "test", ("train", "dev", "test"), "Questions to answer.")
_LIMIT = absl_flags.DEFINE_integer("eval_limit", 0, "The first N questions of the split; 0: all.", lower_bound=0)
_BATCH = absl_flags.DEFINE_integer("eval_batch_size", 8, "Questions decoded at once.", lower_bound=1)
_FILE = absl_flags.DEFINE_string("predictions", "", "File of the predictions (.jsonl).")


def main(arguments: Sequence[str]) -> None:
    from ragjax.errors import UserError
    from ragjax.evaluation import evaluate_run

    if arguments:
        raise UserError(f"ragjax.evaluate takes flags only, not {arguments[0]!r}: see --help.")
    evaluate_run(_RUN_DIR.value, _SPLIT.value, _LIMIT.value, _BATCH.value, _FILE.value)


if __name__ == "__main__":
    flags.run_command(main)
