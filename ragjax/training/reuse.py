"""Taking over what a finished run has trained, instead of training it again."""

from pathlib import Path

from ragjax.checkpoints import Checkpoints
from ragjax.config import RunConfig
from ragjax.costs import Ledger
from ragjax.errors import UserError
from ragjax.pipeline import CHECKPOINT_FOLDER, SUMMARY_FILE, Pipeline, check_input_unchanged, read_run_record
from ragjax.training.loop import PhaseResult
from ragjax.training.strategies import Phase

# What shapes the adapters of a generator.
_ADAPTER_FLAGS = ("lora_rank", "lora_alpha", "lora_targets", "quantize")


def source_run(config: RunConfig, phase: Phase) -> str:
    """The run whose result the phase takes over; "" where it trains."""
    return {"embedder": config.embedder_run, "generator": config.generator_run}.get(phase.name, "")


def adopt(config: RunConfig, phase: Phase, pipeline: Pipeline, folder: Path) -> PhaseResult:
    """What the phase made in the run that the configuration names, copied into this run's folder.

    Raises:
      UserError: that run is not finished, has no such phase, or began from other models.
    """
    flag = f"{phase.name}_run"
    source = Path(source_run(config, phase))
    own = Checkpoints(folder / CHECKPOINT_FOLDER / phase.name)
    if own.latest_step() is None:
        other, record = read_run_record(source)
        if phase.name not in record["phases"] or not (source / SUMMARY_FILE).is_file():
            raise UserError(
                f"--{flag}={source} is no finished run that tuned the {phase.name} by itself: finish it, or choose "
                "another."
            )
        check_input_unchanged(record, source, phase.name, getattr(pipeline, phase.name).source.sha256)
        if phase.name == "generator":
            for name in _ADAPTER_FLAGS:
                if getattr(other, name) != getattr(config, name):
                    raise UserError(
                        f"--{flag}={source} was trained with --{name}={getattr(other, name)} (now "
                        f"{getattr(config, name)}): repeat that flag or choose another run."
                    )
        step, trees, extras = Checkpoints(source / CHECKPOINT_FOLDER / phase.name).restore({"trainable": None})
        own.save(step, trees, {"cost": extras["cost"], "questions": extras["questions"], "source": str(source)})
    _, trees, extras = own.restore({"trainable": None})
    return PhaseResult(trees["trainable"], Ledger(extras["cost"]), extras["questions"])
