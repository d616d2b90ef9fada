"""The whole dry run: the machine, each phase's needs, whether they fit, and else what would."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from ragjax.config import RunConfig
from ragjax.dry_run.lengths import Lengths, find_lengths, local_data
from ragjax.dry_run.machines import Machine, machine_here, read_machine
from ragjax.dry_run.needs import Needs, PlannedStep
from ragjax.dry_run.shapes import shaped_models
from ragjax.errors import UserError
from ragjax.fields import changed_flags
from ragjax.parallel import pretend_devices, refuse_several_processes
from ragjax.pipeline import arrangement_of
from ragjax.pretrained import abstract_decoder
from ragjax.training.reuse import source_run
from ragjax.training.run import check_batches, check_splits, settle_strategy
from ragjax.training.signals import prompt_passages
from ragjax.training.strategies import Phase, needs_generator, phases_of
from ragjax.voice import counted, say

_GB = 1e9


def dry_run(config: RunConfig, devices: str = "") -> None:
    """Prints what each phase of a run takes of each device. No weights are read, and nothing is written.

    Args:
      config: of the run.
      devices: a machine's name, such as "8xa10" or "v5e-64"; empty: the devices here.

    Raises:
      UserError: bad flags, a model whose config.json is not to be had, a phase that does not fit (with what would), or
        devices by name in a process that has used its own.
    """
    if devices:
        machine = read_machine(devices)
        pretend_devices(machine.count)
    else:
        machine = machine_here()
    refuse_several_processes()
    strategy, _ = settle_strategy(config)
    phases = [
        phase for phase in phases_of(dataclasses.replace(config, strategy=strategy)) if _is_trained(config, phase)
    ]
    if not phases:
        say(f"--strategy={strategy} trains nothing here, so there is no step to try out.")
        return
    if (dataset := local_data(config.data)) is not None:
        check_splits(config, dataset, phases)
    check_batches(config, phases)
    trial = Trial(config, phases)
    room = f"{machine.usable / _GB:.1f} GB each" if math.isfinite(machine.usable) else "who knows how much memory"
    devices = counted(machine.count, "device")
    say(f"dry run of {strategy} on {machine.name}: {devices}, {room} for a program ({machine.remark})")
    for line in trial.described():
        say(line)
    found = {}
    for step, phase in zip(trial.steps, phases, strict=True):
        needs = found[phase.name] = step.needs(machine.is_named)
        say(f"\n{_table(phase, needs, machine)}", flush=True)
    say(f"\n{_how_planned(machine)}")
    name, most = max(found.items(), key=lambda item: item[1].total)
    if most.total > machine.usable:
        raise UserError(_refusal(name, most, machine, trial))


def _is_trained(config: RunConfig, phase: Phase) -> bool:
    return not source_run(config, phase)


class Trial:
    """A configuration's phases with all that is known of them before anything is compiled."""

    def __init__(self, config: RunConfig, phases: Sequence[Phase]):
        """Raises UserError where the models cannot be shared out as --mesh says, or cannot be found."""
        self.config, self.phases = config, phases
        arrangement = arrangement_of(config)
        reads = needs_generator(phases, answers=config.decode != "none")
        self.models = shaped_models(config, with_generator=reads)
        if self.models.reader is not None:
            shape = self.models.reader.config
            arrangement.check(abstract_decoder(shape)["params"], self.models.reader.source.name)
        self.lengths = [self._lengths(phase) for phase in phases]
        self.steps = [
            PlannedStep(phase, self.models, lengths, arrangement)
            for phase, lengths in zip(phases, self.lengths, strict=True)
        ]

    def _lengths(self, phase: Phase) -> Lengths:
        config = self.config
        leaves_one_out = config.retriever_objective == "loop" and "generator" not in phase.trains
        per_prompt = config.top_k - 1 if leaves_one_out else prompt_passages(config)
        reader = self.models.reader if phase.signal.reads_answers else None
        return find_lengths(config, self.models.embedder, reader, per_prompt)

    def described(self) -> list[str]:
        """What it rests on, in lines."""
        embedder, reader = self.models.embedder.source, self.models.reader
        lines = [f"embedder: {embedder.name}, {embedder.origin}"]
        if reader is not None:
            stored = f", layers stored as {reader.config.quantize}" if reader.config.quantize else ""
            lines.append(f"generator: {reader.source.name}, {reader.source.origin}{stored}")
        remarks = dict.fromkeys(remark for lengths in self.lengths for remark in lengths.remarks)
        return [*lines, f"texts: {'; '.join(remarks)}"]

    def fits(self, machine: Machine) -> bool:
        """Compiles only where what lies on a device leaves room."""
        lies = all(step.held.total < machine.usable for step in self.steps)
        return lies and all(step.needs(machine.is_named).total <= machine.usable for step in self.steps)


def _table(phase: Phase, needs: Needs, machine: Machine) -> str:
    layout = needs.layout
    rows = f", {needs.shape.rows} rows of {needs.shape.row_length} tokens each" if needs.shape else ""
    lines = [
        f"phase {phase.name} (trains {' and '.join(phase.trains)}): a step has {counted(layout.groups, 'group')} of "
        f"devices x {counted(layout.micro_batches, 'micro-batch')} x {counted(layout.size, 'question')}{rows}",
        *(f"  {name:<28}{value / _GB:8.2f} GB" for name, value in _parts(needs)),
        f"  {'together, on each device':<28}{needs.total / _GB:8.2f} GB{_verdict(needs, machine)}",
        f"  sent: {_sent(needs)}",
        f"  computed: {needs.flops:.2e} FLOPs a step on all devices together",
    ]
    return "\n".join(lines)


def _parts(needs: Needs) -> list[tuple[str, int]]:
    held = needs.held
    return [
        ("parameters", held.parameters),
        ("adapters", held.adapters),
        ("optimizer", held.optimizer),
        ("what is trained, as it was", held.untrained),
        ("batch", held.batch),
        ("activations, temporaries", needs.activations),
    ]


def _verdict(needs: Needs, machine: Machine) -> str:
    if not math.isfinite(machine.usable):
        return ""
    return f" of {machine.usable / _GB:.2f}: {'fits' if needs.total <= machine.usable else 'does not fit'}"


def _sent(needs: Needs) -> str:
    if not needs.collectives:
        return "nothing"
    each = [f"{sent.times} x {kind}, {sent.bytes / _GB:.3g} GB" for kind, sent in needs.collectives.items()]
    return f"{'; '.join(each)} (results on each device, a step)"


def _how_planned(machine: Machine) -> str:
    if not machine.is_named:
        return "The step was compiled for the devices here: its temporaries are what it will take."
    return (
        "The step was compiled for as many virtual CPU devices. Weights, optimizer and batch are the same anywhere;\n"
        "temporaries and what is sent are the CPU's plan, which makes float32 of bfloat16 factors and results: a GPU\n"
        "or TPU takes less of them as a rule."
    )


# ---- what would fit ----------------------------------------------------------------------------------------


def _refusal(name: str, needs: Needs, machine: Machine, trial: Trial) -> str:
    """The sentence, with the first change that is found to help."""
    start = (
        f"the phase {name} needs {needs.total / _GB:.1f} GB of each device, and {machine.name} has "
        f"{machine.usable / _GB:.1f} GB: "
    )
    say("\nIt does not fit. Trying what would ...", flush=True)
    for proposed in _proposals(trial.config, machine.count, trial.phases):
        flags = " ".join(changed_flags(proposed, trial.config))
        try:
            fits = Trial(proposed, trial.phases).fits(machine)
        except UserError:  # a width that the mesh does not divide
            continue
        if fits:
            return f"{start}{flags} would fit."
    return f"{start}nothing that was tried fits, so take larger devices, more of them, or a smaller model."


def _proposals(config: RunConfig, count: int, phases: Sequence[Phase]) -> Iterator[RunConfig]:
    """Changes of a configuration that take less memory: one alone, cheapest first, then the first ones together."""
    trains_generator = any("generator" in phase.trains for phase in phases)
    size = min(phase.batch_size(config) for phase in phases)
    changes: list[dict[str, Any]] = []
    if config.dtype == "float32":
        changes.append({"dtype": "bfloat16"})
    if (each := -(-config.batch_size // arrangement_of(config).groups)) > config.gradient_accumulation:
        changes.append({"gradient_accumulation": each})
    if config.remat != "full" and trains_generator:
        changes.append({"remat": "full"})
    if config.parallelism == "pmap" and count > 1:
        changes.append({"parallelism": "mesh", "mesh": _mesh(count, size)})
    if config.quantize == "none" and config.lora_rank:
        changes.append({"quantize": "nf4"})
    together = [dict(pair for change in changes[:n] for pair in change.items()) for n in range(2, len(changes) + 1)]
    for change in [*changes, *together]:
        yield dataclasses.replace(config, **change)


def _mesh(count: int, questions: int) -> str:
    """Fsdp over as many devices as a step has questions for, tensor over the rest."""
    groups = max(n for n in range(1, count + 1) if count % n == 0 and n <= questions)
    return f"fsdp:{groups}" if groups == count else f"fsdp:{groups},tensor:{count // groups}"
