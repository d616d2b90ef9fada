"""The run folder: whose run it is, who may write it, and what is said of one that is damaged or somebody else's."""

import dataclasses
import json
import os

import numpy as np
import pytest

from ragjax.checkpoints import Checkpoints
from ragjax.config import RunConfig
from ragjax.errors import UserError
from ragjax.files import write_json
from ragjax.runs import RunFolder, RunRecord, Summary, read_phases

INPUTS = {name: {"sha256": digit * 64} for name, digit in (("embedder", "a"), ("generator", "b"), ("data", "c"))}
SUMMARY = Summary(
    strategy="joint",
    objective="rag_token",
    split="test",
    n=2,
    before={"em": 0.0, "recall_at_5": None},
    after={"em": 0.5, "recall_at_5": None},
    change_95={"em": [0.5, -0.1, 1.0], "recall_at_5": None},
    cost={"seconds": 1.5, "phases": {"joint": {"tokens": 3}}},
    strategy_costs=[{"strategy": "joint", "seconds": None}],
    skipped_questions=1,
    peak_memory_bytes=7,
    retrieval={"top_k": 3},
)


@pytest.fixture
def begun(tmp_path) -> RunFolder:
    """The folder of a run that has just begun."""
    files = RunFolder(tmp_path / "run")
    files.begin(RunRecord(RunConfig(run_dir="where/it/was"), ("joint",), INPUTS), {}, {}, {}, [])
    return files


def test_a_new_folder_takes_any_run(tmp_path):
    files = RunFolder(tmp_path / "new")
    files.check_flags(RunConfig(top_k=9))
    files.check_inputs(INPUTS)
    assert files.read_summary() is None
    assert not (files.is_begun or files.is_finished or files.path.exists())


def test_flags_must_be_those_of_the_run(begun):
    begun.check_flags(RunConfig(run_dir="where/it/is"))  # a folder can move
    # A machine with other devices, or a disk with less room.
    begun.check_flags(RunConfig(parallelism="mesh", mesh="fsdp:2", checkpoint_every=3, keep_checkpoints=1))
    with pytest.raises(UserError) as caught:
        begun.check_flags(RunConfig(top_k=9, seed=3))
    assert str(caught.value) == (
        f"{begun.path} holds a run with --top_k=5 (now 9), --seed=0 (now 3): repeat those flags or choose another "
        "--run_dir."
    )


def test_a_flag_that_the_run_did_not_know_was_as_it_is_by_default(begun):
    content = json.loads(begun.config_file.read_text())
    del content["flags"]["remat"]
    write_json(begun.config_file, content)
    begun.check_flags(RunConfig())
    with pytest.raises(UserError, match=r"holds a run with --remat=partial \(now full\)"):
        begun.check_flags(RunConfig(remat="full"))


def test_inputs_must_be_those_of_the_run(begun):
    begun.check_inputs(INPUTS)
    begun.check_inputs({"data": INPUTS["data"]})  # one is asked about alone
    with pytest.raises(UserError) as caught:
        begun.check_inputs(INPUTS | {"generator": {"sha256": "d" * 64}})
    assert str(caught.value) == (
        f"{begun.path} was made with a different --generator (sha256 {'b' * 12}, now {'d' * 12}): restore "
        "the original or choose another --run_dir."
    )


def test_the_record_says_whose_run_it_is(begun):
    record = begun.record()
    assert record.config == RunConfig(run_dir=os.path.abspath("where/it/was"))
    assert (record.phases, record.inputs) == (("joint",), INPUTS)


@pytest.mark.parametrize(
    ("part", "value", "fault"),
    [
        ("phases", None, "it lacks 'phases'"),
        ("flags", {"beam_me": 1}, "got an unexpected keyword argument 'beam_me'"),
    ],
)
def test_a_record_of_something_else_is_refused(begun, part, value, fault):
    content = json.loads(begun.config_file.read_text())
    if value is None:
        del content[part]
    else:
        content[part] = value
    write_json(begun.config_file, content)
    with pytest.raises(UserError, match=rf"config\.json does not describe a run of this version \(.*{fault}\)"):
        begun.record()


def test_another_programs_config_json_is_no_runs(begun):
    """A model's folder, say, given as --run_dir."""
    write_json(begun.config_file, {"model_type": "llama"})
    for ask in (begun.record, lambda: begun.check_flags(RunConfig()), lambda: begun.check_inputs(INPUTS)):
        with pytest.raises(
            UserError, match=r"config\.json does not describe a run of this version \(it lacks 'flags'\)"
        ):
            ask()


def test_a_recorded_flag_of_another_kind_is_named_with_its_file(begun):
    content = json.loads(begun.config_file.read_text())
    content["flags"]["top_k"] = "2"
    write_json(begun.config_file, content)
    with pytest.raises(UserError, match=rf"{begun.config_file} does not .* version: top_k='2' is not a whole number"):
        begun.record()


def test_a_folder_without_a_run_has_no_record(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} holds no config.json: give --run_dir the folder of a ragjax."):
        RunFolder(tmp_path).record()


def test_a_summary_comes_back_as_it_was_written(tmp_path):
    files = RunFolder(tmp_path)
    files.write_summary(SUMMARY)
    assert files.is_finished
    assert files.read_summary() == SUMMARY
    names = list(json.loads((tmp_path / "summary.json").read_text()))
    assert names[:7] == ["strategy", "objective", "split", "n", "before", "after", "change_95"]


def test_the_oldest_summaries_are_read_too(tmp_path):
    later = {"change_95": {}, "strategy_costs": (), "skipped_questions": 0, "skipped_steps": {}, "step_share": {}}
    content = {name: value for name, value in dataclasses.asdict(SUMMARY).items() if name not in later}
    write_json(tmp_path / "summary.json", content)
    assert RunFolder(tmp_path).read_summary() == dataclasses.replace(SUMMARY, **later)


@pytest.mark.parametrize("change", [{"n": None}, {"extra": 1}])
def test_a_summary_with_a_field_too_many_or_too_few_is_refused(tmp_path, change):
    content = {name: value for name, value in (dataclasses.asdict(SUMMARY) | change).items() if value is not None}
    write_json(tmp_path / "summary.json", content)
    (name,) = change
    with pytest.raises(UserError, match=rf"summary\.json does not describe a run of this version \(.*'{name}'\)"):
        RunFolder(tmp_path).read_summary()


def test_one_process_at_a_time_holds_a_folder(tmp_path):
    files = RunFolder(tmp_path / "deep" / "run")
    with files.held():
        assert (files.path / ".lock").is_file()
        with pytest.raises(UserError, match=f"Another process is working on {files.path}: wait for it"), files.held():
            pass
    with pytest.raises(KeyboardInterrupt), files.held():
        raise KeyboardInterrupt
    with files.held():  # it was given back, both times
        pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=rf"--run_dir={tmp_path}/file/run cannot be written \(Not a directory\)"),
        RunFolder(tmp_path / "file" / "run").held(),
    ):
        pass


def test_a_search_keeps_each_trial_in_a_run_folder_of_its_own(tmp_path):
    search = RunFolder(tmp_path)
    one, other = search.trial("generator-0.1"), search.trial("generator-0.2")
    assert one.metrics_file != other.metrics_file != search.metrics_file
    assert one.checkpoints("generator").is_relative_to(one.path)
    assert one.path.is_relative_to(search.path)


def test_phases_are_read_up_to_the_first_without_a_checkpoint(tmp_path):
    files, phases = RunFolder(tmp_path), ["one", "two", "three"]
    for name, step in (("one", 4), ("one", 6), ("three", 2)):
        tree = {"embedder": {"params": {"w": np.full(2, step, np.float32)}}}
        Checkpoints(files.checkpoints(name)).save(step, {"trainable": tree}, {})
    (found,) = read_phases(files, phases)
    assert (found.name, found.step) == ("one", 6)
    np.testing.assert_array_equal(found.trained["embedder"]["params"]["w"], [6, 6])
    assert not files.checkpoints("two").exists()  # looking made nothing
    assert read_phases(files, []) == []
    with pytest.raises(UserError, match=f"{tmp_path} holds no checkpoint: run ragjax.train on this run folder first"):
        read_phases(files, ["two", "three"])
