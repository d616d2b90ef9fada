"""A run: its configuration, folder, data and pipeline, which go together from its preparation to its answers."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ragjax.arrays import Variables
from ragjax.config import RunConfig
from ragjax.data.dataset import Dataset, load_dataset
from ragjax.errors import UserError
from ragjax.parallel import Arrangement, device_count
from ragjax.pipeline import (
    Pipeline,
    arrangement_of,
    build_pipeline,
    load_untrained_embedder,
    load_untrained_generator,
    reranks_by_likelihood,
)
from ragjax.pretrained import Embedder, Generator
from ragjax.reranking import find_cross_encoder
from ragjax.retrieval import Retrieval, read_index_record
from ragjax.runs.asking import Answer, ask
from ragjax.runs.folder import RunFolder, RunRecord, read_phases
from ragjax.runs.summary import Summary
from ragjax.voice import say
from ragjax.weights import resolve_model

# What a run is made from, in the order in which it is announced.
INPUTS = ("embedder", "generator", "data", "index_dir", "rerank")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run with all that it works on. Its models are those that it starts from, or what was trained so far."""

    config: RunConfig
    files: RunFolder
    dataset: Dataset
    pipeline: Pipeline
    step: int = 0  # of the checkpoint that the models come from; 0: none

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.files.path

    @property
    def arrangement(self) -> Arrangement:
        """How the devices work together that train it."""
        return arrangement_of(self.config)

    @property
    def embedder(self) -> Embedder:
        """As it was trained so far."""
        return self.pipeline.embedder

    @property
    def generator(self) -> Generator:
        """As it was trained so far. Raises UserError where the run was opened for retrieval alone."""
        if self.pipeline.reader is None:
            raise UserError(f"{self.folder} was opened without its generator: open it with `ragjax.open_run`.")
        return self.pipeline.reader.generator

    @property
    def variables(self) -> dict[str, Variables]:
        """Of the models that are loaded: {"embedder" | "generator": {collection: parameters}}."""
        return self.pipeline.variables

    @property
    def summary(self) -> Summary | None:
        """Scores before and after training, costs, the retrieval; None where training has not come to its end."""
        return self.files.read_summary()

    def inputs(self) -> dict[str, dict[str, str]]:
        """What the run is made from, with hashes: part of config.json."""
        return _inputs(self.config, self.dataset, self.embedder, self.generator if self.pipeline.reader else None)

    def retrieve(self, questions: Sequence[str], k: int) -> Retrieval:
        """The k nearest passages of each question."""
        return self.pipeline.retrieve(questions, k)

    def ask(self, question: str) -> Answer:
        """Answers a question as the configuration says. Raises UserError where it is too long for the generator."""
        return ask(self.pipeline, question, self.config)

    def with_trained(self, trained: Mapping[str, Variables]) -> "Run":
        """The same run with trained collections, {"embedder" | "generator": {"params" | "lora": tree}}.

        With --refresh_passages a trained embedder's own vectors of the passages are searched: from the cache, or
        encoded now.
        """
        pipeline = self.pipeline.with_trained(trained)
        if self.config.refresh_passages and "embedder" in trained:
            pipeline = pipeline.encoded_anew(self.config)
        return dataclasses.replace(self, pipeline=pipeline)

    def unfinished(self) -> str | None:
        """A sentence for the user where training has not come to its end."""
        if self.files.is_finished:
            return None
        return f"{self.folder} is not finished: its state of step {self.step} is used."


def _inputs(
    config: RunConfig, dataset: Dataset, embedder: Embedder, generator: Generator | None
) -> dict[str, dict[str, str]]:
    models = {"embedder": embedder, "generator": generator}
    described = {
        name: {"source": model.describe(), "sha256": model.source.sha256}
        for name, model in models.items()
        if model is not None
    }
    described["data"] = {"name": dataset.name, "sha256": dataset.sha256}
    if config.index_dir:
        record = read_index_record(Path(config.index_dir))
        described["index_dir"] = {"source": record.factory, "sha256": record.sha256}
    if config.rerank:
        if not reranks_by_likelihood(config):
            source = find_cross_encoder(config.rerank)
        else:  # hashing the generator again would read all of it
            source = resolve_model(config.generator) if generator is None else generator.source
        described["rerank"] = {"source": source.describe(), "sha256": source.sha256}
    return described


def prepare(
    config: RunConfig,
    dataset: Dataset | None = None,
    *,
    check: Callable[[Mapping[str, Mapping[str, str]]], None] | None = None,
    announced: Sequence[str] = (),
    with_generator: bool = True,
    models: tuple[Embedder, Generator | None] | None = None,
) -> Run:
    """Loads what a configuration names: data, untrained models, and the index over the corpus.

    Args:
      config: flags; `run_dir` is the run's folder, in which nothing is written yet.
      dataset: its data, where they are loaded already.
      check: is called with `Run.inputs` of them, and may refuse them, before the corpus is encoded.
      announced: which of INPUTS are printed, in that order, where the run has them.
      with_generator: or the generator is not loaded, and the run can only retrieve.
      models: the untrained models, where they are loaded already.

    Raises:
      UserError: bad data, models that cannot be loaded, a --top_k larger than the corpus.
    """
    dataset = dataset or load_dataset(config.data)
    if models is None:
        models = load_untrained_embedder(config), load_untrained_generator(config) if with_generator else None
    embedder, generator = models
    inputs = _inputs(config, dataset, embedder, generator)
    words = {"generator": "not needed", "data": _describe_data(dataset)}
    words |= {name: about["source"] for name, about in inputs.items() if name != "data"}
    for name in announced:
        if name in words:
            say(f"{name}: {words[name]}", flush=True)
    if check is not None:
        check(inputs)
    pipeline = build_pipeline(config, dataset, embedder, generator)
    return Run(config, RunFolder(Path(config.run_dir)), dataset, pipeline)


def _describe_data(dataset: Dataset) -> str:
    counts = f"{len(dataset.train)} / {len(dataset.dev)} / {len(dataset.test)} questions"
    note = f" ({dataset.note})" if dataset.note else ""
    return f"{dataset.name}, {len(dataset.passages)} passages, {counts}{note}, sha256 {dataset.sha256[:12]}"


def open_run(
    run_dir: str | Path,
    with_generator: bool = True,
    data: str | Path = "",
    search: Mapping[str, Any] | None = None,
) -> Run:
    """The trained pipeline of a run folder, as its phases have kept it.

    with_generator: or the generator is not loaded, and the run can only retrieve.
    data: the folder that has the run's data now, where they were moved.
    search: fields of RetrievalConfig that differ from the run's. An index_dir names another index of the same passages,
      or where the run's own is now; without an nprobe beside it, it is searched as it was built.

    Raises:
      UserError: the folder holds no run, no checkpoint yet, or its models or data have changed since.
    """
    files = RunFolder(Path(run_dir))
    record = files.record()
    dataset = _data_of(record, files, data)
    changed = {**({"nprobe": 0} if "index_dir" in (search or {}) else {}), **(search or {})}

    def check(inputs: Mapping[str, Mapping[str, str]]) -> None:
        files.check_inputs({name: each for name, each in inputs.items() if name not in changed})

    config = _for_these_devices(dataclasses.replace(record.config, **changed))
    if config.refresh_passages and (other := config.beyond_one_exact_search):
        raise UserError(
            f"{files.path} was trained with --refresh_passages={config.refresh_passages}, and has vectors of its own, "
            f"all of which are searched once, on the host: leave {other} out."
        )
    run = prepare(config, dataset, check=check, with_generator=with_generator)
    phases = read_phases(files, record.phases)
    for phase in phases:
        run = run.with_trained(run.arrangement.keep(phase.trained))
    return dataclasses.replace(run, files=files, step=phases[-1].step if phases else 0)


def _for_these_devices(config: RunConfig) -> RunConfig:
    """Without the mesh of another number of devices: what was trained on many is asked on one."""
    if not config.mesh_sizes or math.prod(config.mesh_sizes.values()) == device_count():
        return config
    return dataclasses.replace(config, parallelism="pmap", mesh="")


def _data_of(record: RunRecord, files: RunFolder, moved_to: str | Path) -> Dataset:
    recorded = record.config.data
    try:
        return load_dataset(moved_to or recorded)
    except UserError as error:
        if moved_to or not Path(recorded).is_absolute() or Path(recorded).exists():  # a name is not a path
            raise
        raise UserError(
            f"the data of {files.path} are not at {recorded} any more: give --data the folder that has them now."
        ) from error
