"""The commands as functions: what they read from flags comes as arguments, with the same checks and sentences.

They print what the commands print while they work. What is found is returned, and stands in the run's folder.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ragjax import training
from ragjax.config import DecodeConfig, EvaluateConfig, PrepareConfig, RetrievalConfig, RunConfig
from ragjax.data import preparing
from ragjax.data.chunking import RECIPES, make_chunker
from ragjax.data.sources import open_corpus, open_source
from ragjax.errors import UserError
from ragjax.evaluation import Evaluation, evaluate_runs
from ragjax.parallel import refuse_several_processes
from ragjax.runs import Run, open_run
from ragjax.voice import say
from ragjax.weights import load_tokenizer, read_config, resolve_model


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


def prepare(config: PrepareConfig) -> Path:
    """Brings a source into a data folder, which is returned: what `data` of a RunConfig takes.

    Raises:
      UserError: bad data, a name that is not known or out of reach, a package that it needs is missing, `out` exists,
        no room, or one of several processes; then `out` does not exist.
    """
    refuse_several_processes()
    for name, what in (("source", "name a folder or a set"), ("out", "name the folder to write")):
        if not getattr(config, name).strip():
            raise UserError(f"--{name} is empty: {what}.")
    source = open_source(config.source)
    corpus = open_corpus(config.corpus) if config.corpus else None
    say(f"source: {source.describe()}", flush=True)
    if corpus:
        say(f"corpus: {corpus.describe()}", flush=True)
    record = preparing.prepare(source, config.out, corpus, _cutting(config))
    for line in preparing.summary_of(record):
        say(line)
    return Path(config.out)


def _cutting(config: PrepareConfig) -> preparing.Cutting | None:
    """How documents are cut. Raises UserError for sizes that are given and not used, or do not fit each other."""
    if config.chunk == "none":
        if config.chunk_size is not None or config.chunk_overlap is not None:
            raise UserError("--chunk_size and --chunk_overlap need --chunk: choose paragraphs, words or tokens.")
        return None
    size, overlap = RECIPES[config.chunk]
    size = size if config.chunk_size is None else config.chunk_size
    overlap = overlap if config.chunk_overlap is None else config.chunk_overlap
    described = {"how": config.chunk, "size": size, "overlap": overlap}
    if config.chunk != "tokens":
        return preparing.Cutting(make_chunker(config.chunk, size, overlap), described)
    model = resolve_model(config.embedder)
    tokenizer = load_tokenizer(model, read_config(model)).backend_tokenizer

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    cut = make_chunker("tokens", size, overlap, count_tokens)
    return preparing.Cutting(cut, described | {"tokenizer": model.describe()})
