"""A dry run says what a run then takes: its batches, its weights, and what fits."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from ragjax.config import RunConfig
from ragjax.dry_run import dry_run
from ragjax.dry_run import needs as needs_module
from ragjax.dry_run import run as module
from ragjax.dry_run.lengths import Lengths, find_lengths
from ragjax.dry_run.machines import Machine, read_machine
from ragjax.dry_run.needs import PlannedStep
from ragjax.dry_run.run import Trial
from ragjax.dry_run.shapes import shaped_models
from ragjax.errors import UserError
from ragjax.parallel import Replicated
from ragjax.runs import prepare
from ragjax.training.loop import Trainer
from ragjax.training.records import MetricsLog
from ragjax.training.signals.prompt_side import prompt_lengths, prompt_passages
from ragjax.training.strategies import STRATEGIES, phases_of
from tests.tiny_runs import tiny_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


PAPER = Path(__file__).resolve().parents[2] / "experiments" / "paper"
ONE = Replicated(jax.local_devices()[:1])


def shapes_of(tree):
    return [(leaf.shape, np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(tree)]


def bytes_on_first(tree) -> int:
    first = jax.local_devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        ("joint", {"backward_passages": 1, "gradient_accumulation": 2}),
        ("generator", {"objective": "concat_nll", "lora_rank": 0, "dtype": "bfloat16"}),
        ("two_phase", {"quantize": "nf4", "dtype": "bfloat16"}),
        ("embedder", {"hard_negatives": 2, "ranking_batch_size": 3, "decode": "concat"}),
    ],
)
def test_shapes_and_bytes_are_those_of_the_run(world, strategy, changes):
    config = world.config(world.folder / "runs" / "dry", strategy=strategy, **changes)
    run, models = prepare(config), shaped_models(config, with_generator=True)
    for phase in STRATEGIES[strategy]:
        with contextlib.closing(MetricsLog(run.files)) as log:
            trainer = Trainer(run, phase, log)
        assembler = trainer._assembler
        questions = assembler._questions if hasattr(assembler, "_questions") else assembler._side
        read = None
        if phase.signal.reads_answers:
            read = prompt_lengths(run, questions, assembler.sampler, prompt_passages(config))
        planned = PlannedStep(phase, models, Lengths(questions.question_length, read, ()), run.arrangement)
        batch = assembler.assemble(assembler.sampler.training_batch(0), run.variables, trainer.ledger).batch
        assert shapes_of(planned._batch) == shapes_of(batch)
        assert shapes_of(planned._state) == shapes_of(trainer.state)
        assert shapes_of(planned._frozen) == shapes_of(trainer.frozen)
        held, state = planned.held, trainer.state
        assert held.parameters + held.adapters == bytes_on_first((state.trainable, trainer.frozen))
        assert held.optimizer == bytes_on_first((state.optimizer, state.step, state.learning_rates))
        assert held.batch == sum(leaf.nbytes for leaf in jax.tree.leaves(batch)) // run.arrangement.groups
        assert held.untrained == bytes_on_first(state.trainable)


def test_what_lies_there_and_what_is_planned_is_all_of_the_program(world, monkeypatch):
    """The compiled program's own arguments are what was added up from shapes."""
    config = world.config(world.folder / "runs" / "dry")
    models, (phase,) = shaped_models(config, with_generator=True), STRATEGIES["joint"]
    lengths = find_lengths(config, models.embedder, models.generator, 1)
    planned = PlannedStep(phase, models, lengths, ONE)
    programs, compile_it = [], needs_module._compiled
    monkeypatch.setattr(needs_module, "_compiled", lambda *given: programs.append(compile_it(*given)) or programs[-1])
    needs = planned.needs()
    unread = planned._batch.rows.dropout_ids.size * 4  # without dropout
    arguments = programs[0].memory_analysis().argument_size_in_bytes
    assert arguments == planned.held.total - planned.held.untrained - unread
    assert needs.activations > 0 and needs.collectives == {}
    larger = PlannedStep(phase, shaped_models(dataclasses.replace(config, batch_size=8), True), lengths, ONE)
    assert larger.held.parameters == planned.held.parameters
    assert larger._flops() == pytest.approx(4 * needs.flops)


def test_lengths_are_measured_where_data_and_tokenizer_are_here(world, tmp_path):
    config = world.config(tmp_path)
    models = shaped_models(config, with_generator=True)
    found = find_lengths(config, models.embedder, models.generator, 1)
    run = prepare(config)
    every = [*run.dataset.train, *run.dataset.dev[:3]]  # --dev_limit
    assert found.question == -(-max(len(run.embedder.query_tokens([q.question])[0]) for q in every) // 8) * 8
    assert found.prompts.answers == [len(run.pipeline.prompts.answer(question.answers[0])) for question in every]
    assert all("assumed" not in remark for remark in found.remarks)


def test_lengths_are_assumed_where_there_is_nothing_to_measure(world, tmp_path):
    config = world.config(tmp_path, data="no-such-set", top_k=5, max_passage_tokens=100)
    models = shaped_models(config, with_generator=True)
    found = find_lengths(config, models.embedder, models.generator, 5)
    window = models.generator.config.max_position_embeddings
    assert found.prompts.longest == min(96 + 5 * 100 + 16, window)
    assert found.question == min(64, models.embedder.config.max_position_embeddings)
    assert all("assumed, as no data are here" in remark for remark in found.remarks)


def test_what_does_not_fit_is_refused_with_what_would(world, capsys, monkeypatch):
    quick = {"strategy": "generator", "objective": "concat_nll", "dtype": "bfloat16"}  # to compile
    config = world.config(world.folder / "runs" / "dry", batch_size=4, decode="none", **quick)
    compiled, needs_of = {}, PlannedStep.needs

    def needs(self, stands_in=False):
        if self._models.config not in compiled:
            compiled[self._models.config] = needs_of(self, stands_in)
        return compiled[self._models.config]

    def try_out(usable):
        monkeypatch.setattr(module, "machine_here", lambda: Machine("a box", 1, usable, "free", is_named=False))
        dry_run(config)
        return capsys.readouterr().out

    monkeypatch.setattr(PlannedStep, "needs", needs)
    assert "does not fit" not in try_out(1e12)
    assert not (world.folder / "runs" / "dry" / "config.json").exists()
    needed = compiled[config].total
    assert "does not fit" not in try_out(needed)
    with pytest.raises(UserError) as caught:
        try_out(needed - 1)
    start = f"the phase generator needs {needed / 1e9:.1f} GB of each device, and a box has {needed / 1e9:.1f} GB: "
    assert str(caught.value) == f"{start}--gradient_accumulation=4 would fit."
    assert "does not fit" in capsys.readouterr().out
    tried = len(compiled)
    with pytest.raises(UserError, match="nothing that was tried fits"):
        try_out(1)
    assert len(compiled) == tried == 2  # what lies there is too much already, so nothing more is compiled


def test_data_that_cannot_be_trained_on_are_refused(world, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    (data / "train.jsonl").write_text("")
    with pytest.raises(UserError, match="has no train questions"):
        dry_run(world.config(tmp_path / "run", data=str(data)))


def test_a_run_without_phases_has_no_step(world, capsys):
    dry_run(world.config(world.folder / "runs" / "dry", strategy="none"))
    assert "trains nothing" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(PAPER.glob("*.flags")), ids=lambda path: path.stem)
@pytest.mark.parametrize("generator", ["llama3-8b", "mistral-7b"])
def test_the_papers_runs_fit_its_machine_as_far_as_their_weights_go(path, generator):
    """Eight cards of 24 GB, as the flag files say; that the steps fit too, tests/dry_run/test_large.py compiles."""
    lines = path.read_text(encoding="utf-8").splitlines()
    given = dict(line.removeprefix("--").split("=") for line in lines if line.startswith("--"))
    kinds = {field.name: field.metadata["kind"] for field in dataclasses.fields(RunConfig)}
    values = {name: kinds[name](text) for name, text in given.items()}
    config = RunConfig(**values, embedder="mpnet", generator=generator, quantize="nf4", dtype="bfloat16", data="none")
    trial = Trial(config, phases_of(config))
    machine = read_machine("8xa10")
    assert all(4e9 < step.held.total < machine.usable / 2 for step in trial.steps)
