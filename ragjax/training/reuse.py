"""Taking over what a finished run has trained, instead of training it again."""

from pathlib import Path

from ragjax.checkpoints import Checkpoints
from ragjax.config import RunConfig
from ragjax.costs import Ledger
from ragjax.errors import UserError
from ragjax.fields import flag_text
from ragjax.runs import Run, RunFolder, read_phases
from ragjax.training.kept import Kept
from ragjax.training.loop import PhaseResult
from ragjax.training.strategies import Phase

# What a model was trained with and goes on to be used with: the shape of adapters, the texts that an embedder reads,
# whose vectors of the passages it finds.
_FLAGS = {
    "generator": ("lora_rank", "lora_alpha", "lora_targets", "quantize"),
    "embedder": ("query_prefix", "passage_prefix", "refresh_passages"),
}


# The phases that can be taken over: each by the flag that names the run.
REUSED = {"embedder": "embedder_run", "generator": "generator_run"}


def source_run(config: RunConfig, phase: Phase) -> str:
    """The run whose result the phase takes over; "" where it trains."""
    return getattr(config, REUSED[phase.name]) if phase.name in REUSED else ""


def adopt(run: Run, phase: Phase) -> PhaseResult:
    """What the phase made in the run that the configuration names, copied into this run's folder.

    Raises:
      UserError: that run is not finished, has no such phase, or began from other models.
    """
    source = RunFolder(Path(source_run(run.config, phase)))
    own = Checkpoints(run.files.checkpoints(phase.name))
    if own.latest_step() is None:
        _check_source(source, run, phase)
        (found,) = read_phases(source, [phase.name])
        _, _, extras = Checkpoints(source.checkpoints(phase.name)).restore({})
        taken = {name: extras.get(name) for name in ("cost", "questions", "kept")}
        own.save(found.step, {"trainable": found.trained}, {**taken, "source": str(source.path)})
    step, trees, extras = own.restore({"trainable": None})
    kept = Kept(**extras["kept"]) if extras.get("kept") else None
    return PhaseResult(trees["trainable"], Ledger(extras["cost"]), extras["questions"], step, kept=kept)


def _check_source(source: RunFolder, run: Run, phase: Phase) -> None:
    """Raises UserError where the source has nothing that the phase could take over."""
    flag, record = f"{phase.name}_run", source.record()
    if phase.name not in record.phases or not source.is_finished:
        raise UserError(
            f"--{flag}={source.path} is not a finished run that trained the {phase.name} alone: finish it, or choose "
            "another run."
        )
    source.check_inputs({phase.name: {"sha256": getattr(run, phase.name).source.sha256}})
    for name in _FLAGS[phase.name]:
        before, now = getattr(record.config, name), getattr(run.config, name)
        if before != now:
            raise UserError(
                f"--{flag}={source.path} was trained with --{name}={flag_text(before)} (now {flag_text(now)}): repeat "
                "that flag or choose another run."
            )
