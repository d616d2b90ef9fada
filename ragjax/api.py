"""The commands as functions: what they read from flags comes as arguments, with the same checks and sentences.

They print what the commands print while they work. What is found is returned, and stands in the run's folder.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ragjax import training
from ragjax.config import DecodeConfig, EvaluateConfig, RetrievalConfig, RunConfig
from ragjax.evaluation import Evaluation, evaluate_runs
from ragjax.runs import Run, open_run


def train(config: RunConfig) -> Run:
    """Trains what a configuration says, or continues it; the run with its models as trained.

    As with `python -m ragjax.train`, a finished run is not trained again: it is opened. `summary` of the result has
    the scores before and after and the cost.

    Args:
      config: `run_dir` may be empty for runs/STRATEGY.

    Raises:
      UserError: bad input, a folder that belongs to another configuration, training that diverged, or one of several
        processes.
    """
    _, run = training.train_run(config)
    # One that has only retrieved lacks the generator, which `ask` needs.
    return open_run(config.folder) if run is None or run.pipeline.reader is None else run


def evaluate(run: Run | str | Path, **settings: Any) -> Evaluation:
    """Answers questions with a run's models, scores the answers, and compares the run with a second one.

    As with `python -m ragjax.evaluate`, predictions that stand in the run's folder (or in `out`) are not made again.

    Args:
      run: an open run, or a run's folder.
      settings: fields of EvaluateConfig (split, questions, eval_limit, top_k, decode, ...), and those of DecodeConfig
        (num_beams, max_new_tokens, ...) and RetrievalConfig (retriever, hops, rerank, ...) that differ from the run's.

    Raises:
      UserError: what `evaluate_runs` refuses.
      TypeError: a name that neither of the two has.
    """
    own = {field.name for field in dataclasses.fields(EvaluateConfig)}
    overrides = {field.name for kind in (DecodeConfig, RetrievalConfig) for field in dataclasses.fields(kind)} - own
    config = EvaluateConfig(
        run_dir=str(run.folder if isinstance(run, Run) else run),
        **{name: value for name, value in settings.items() if name not in overrides},
    )
    differing = {name: value for name, value in settings.items() if name in overrides}
    return evaluate_runs(config, differing, run if isinstance(run, Run) else None)
