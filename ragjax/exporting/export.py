"""A whole export: which folders a run gives, from what its phases trained."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragjax.config import RunConfig
from ragjax.errors import UserError
from ragjax.exporting.cards import Provenance
from ragjax.exporting.folders import plan_adapter, plan_embedder, plan_generator
from ragjax.files import write_folder
from ragjax.models.lora import COLLECTION
from ragjax.parallel import refuse_several_processes
from ragjax.paths import expanded
from ragjax.runs import RunFolder, read_phases
from ragjax.voice import say
from ragjax.weights import ModelSource, resolve_model
from ragjax.weights.save import MAX_SHARD_BYTES, Trained


@dataclass(frozen=True)
class Results:
    """What the checkpoints of a run hold."""

    trained: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # {model: {collection: parameters}}
    state: str = "nothing was trained"  # in words


def export_run(
    run_dir: str | Path, out: str | Path, merge: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Writes a run's models as folders of other libraries' formats below `out`, which is returned; those that it used.

    embedder/: sentence-transformers. adapter/: PEFT, where adapters were trained. generator/: Hugging Face, with the
    adapters merged into it (`merge`), trained as a whole, or untouched where the run did not train it.

    Raises:
      UserError: bad input (no run, no checkpoint, models that changed since, `out` exists, no room), or one of several
        processes; then `out` does not exist.
    """
    refuse_several_processes()
    if not str(out).strip():
        raise UserError("--out is empty: name the folder to write, which must not exist yet.")
    files, out = RunFolder(Path(run_dir)), Path(expanded(out))
    record = files.record()
    if os.path.lexists(out):  # asked again when it is written; this saves the wait
        raise UserError(f"{out} exists already: choose another folder for --out, or remove it first.")
    summary = files.read_summary()
    results = read_results(files, record.phases, finished=summary is not None)
    # A run that needed no generator leaves an embedder.
    names = [name for name in ("embedder", "generator") if name in record.inputs]
    sources = {name: _source(name, record.config, files) for name in names}
    provenance = Provenance(record.config, record.inputs["data"]["name"], results.state, summary)
    say(f"run: {files.path}, {results.state}", flush=True)

    generator = results.trained.get("generator", {})
    lora = generator.get(COLLECTION, {})
    scale = record.config.lora_alpha / record.config.lora_rank if lora else 0.0
    planned = plan_embedder(
        sources["embedder"], _trained(results.trained.get("embedder", {})), provenance, max_shard_bytes
    )
    if lora:
        planned += plan_adapter(sources["generator"], lora, provenance)
    if "generator" in sources and (merge or not lora):
        planned += plan_generator(sources["generator"], _trained(generator, scale), provenance, max_shard_bytes)
    write_folder(out, planned)
    for name in sorted({file.path.partition("/")[0] for file in planned}):
        size = sum(file.size for file in planned if file.path.startswith(f"{name}/"))
        say(f"{out / name}: {size:,} bytes")
    return out


def read_results(files: RunFolder, phases: Sequence[str], finished: bool) -> Results:
    """What a run has trained so far. Raises UserError when there should be a checkpoint and is none."""
    found = read_phases(files, phases)
    if not found:
        return Results()
    trained = {model: trees for phase in found for model, trees in phase.trained.items()}
    if finished:
        return Results(trained, " and ".join(f"step {phase.step} of the phase {phase.name}" for phase in found))
    last = found[-1]
    return Results(trained, f"not finished: its last checkpoint, step {last.step} of the phase {last.name}")


def _source(name: str, config: RunConfig, files: RunFolder) -> ModelSource:
    source = resolve_model(getattr(config, name))
    files.check_inputs({name: {"sha256": source.sha256}})
    say(f"{name}: {source.describe()}", flush=True)
    return source


def _trained(collections: Mapping[str, Any], lora_scale: float = 0.0) -> Trained:
    return Trained(collections.get("params", {}), collections.get(COLLECTION, {}), lora_scale)
