"""Learning-rate search: stacked copies against single runs, what is shared, who wins, and going on after a stop."""

import dataclasses
import fcntl
import json
import math
import shutil

import numpy as np
import pytest

from ragjax.config import RunConfig, SearchConfig
from ragjax.errors import DivergedError, UserError
from ragjax.pretrained import load_embedder, load_generator
from ragjax.rates import search as search_module
from ragjax.rates import search_rates
from ragjax.rates.search import winner_flags
from ragjax.rates.stacked import train_stacked
from ragjax.runs import Run, RunFolder, prepare
from ragjax.training import train
from ragjax.training.loop import train_phase
from ragjax.training.strategies import STRATEGIES, Phase
from tests.tiny_runs import World, flat, passages, questions, read_lines, tiny_world, write_data

pytestmark = pytest.mark.slow

RATES = [1e-4, 1e-2]
OPTIONS = SearchConfig(embedder_rates="1e-2,1e-4", generator_rates="1e-2,1e-3")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


def searching(world: World, folder, **changes) -> RunConfig:
    open_rates = {"embedder_lr": None, "generator_lr": None}
    return world.config(folder, **open_rates | {"strategy": "two_phase", "max_steps": 2, "eval_limit": 3} | changes)


@pytest.fixture(scope="module")
def prepared(world):
    return prepare(world.config("unused"))


def rerun(prepared: Run, folder, **changes) -> Run:
    """The prepared run with other flags in another folder."""
    return dataclasses.replace(
        prepared, config=dataclasses.replace(prepared.config, **changes), files=RunFolder(folder)
    )


def assembler_of(run: Run, phase: Phase):
    return phase.signal.make_assembler(run, phase.trains)


@pytest.mark.parametrize("phase", [STRATEGIES["two_phase"][1], STRATEGIES["embedder"][0]], ids=lambda phase: phase.name)
def test_a_stacked_copy_is_the_single_run_at_its_rate(prepared, tmp_path, phase):
    flags = {"max_steps": 3, "dev_every": 3, "ranking_batch_size": 3}
    run = rerun(prepared, tmp_path / "stacked", **flags)
    found = train_stacked(run, RATES, assembler_of(run, phase))
    for copy in found.copies:
        single = tmp_path / f"{copy.rate}"
        at_rate = rerun(prepared, single, **flags, embedder_lr=copy.rate)
        trained = train_phase(at_rate, phase).trained["embedder"]["params"]
        start = flat(prepared.embedder.params)
        for name, leaf in flat(trained).items():
            if "key/bias" not in name:  # their gradient is rounding noise, which Adam makes large
                moved = leaf - start[name]
                difference = np.linalg.norm(flat(copy.params)[name] - leaf)
                assert difference <= 1e-3 * np.linalg.norm(moved) + 1e-7, name
        losses = [line["dev_loss"] for line in read_lines(single / "metrics.jsonl") if "dev_loss" in line]
        assert found.start_losses.mean() == pytest.approx(losses[0], rel=1e-5)
        assert copy.dev_losses.mean() == pytest.approx(losses[-1], rel=1e-4)
        assert copy.steps == 3


def test_copies_share_what_they_score(prepared, tmp_path):
    """Two copies that hardly move find the same passages: as many pairs as one copy; a second search scores none."""

    def pairs(rates, folder):
        run = rerun(prepared, folder, max_steps=2, dev_every=1)
        return train_stacked(run, rates, assembler_of(run, STRATEGIES["two_phase"][1])).pairs

    one = pairs([1e-12], tmp_path / "one")
    assert one == 2 * prepared.config.batch_size * prepared.config.top_k
    assert pairs([1e-12, 2e-12], tmp_path / "two") == one
    assert pairs([1e-12, 2e-12], tmp_path / "two") == 0


def test_halving_stops_the_half_with_the_higher_dev_loss(prepared, tmp_path):
    run = rerun(prepared, tmp_path, max_steps=3, dev_every=1)
    rates = [1e-9, 1e-4, 1e-3, 3.0]
    assembler = assembler_of(run, STRATEGIES["two_phase"][1])
    whole = train_stacked(run, rates, assembler)
    halved = train_stacked(run, rates, assembler, rungs=3)
    assert sorted(copy.steps for copy in halved.copies) == [1, 1, 2, 3]
    assert [copy.params is None for copy in halved.copies] == [copy.steps < 3 for copy in halved.copies]
    (last,) = (copy for copy in halved.copies if copy.steps == 3)
    same = next(copy for copy in whole.copies if copy.rate == last.rate)
    np.testing.assert_allclose(last.dev_losses, same.dev_losses, rtol=1e-4)
    worst = max(halved.copies, key=lambda copy: copy.dev_losses.mean() if copy.steps == 1 else -np.inf)
    assert all(worst.dev_losses.mean() >= copy.dev_losses.mean() - 1e-6 for copy in halved.copies if copy.steps > 1)


@pytest.fixture(scope="module")
def two_phase(world):
    config = searching(world, world.folder / "search")
    return config, search_rates(config, OPTIONS)


def test_a_search_has_a_line_for_every_rate_and_names_the_best(two_phase, capsys):
    config, record = two_phase
    trials = {(trial["phase"], *trial["rates"].values()): trial for trial in record["trials"]}
    assert set(trials) == {("generator", 1e-3), ("generator", 1e-2), ("retriever", 1e-4), ("retriever", 1e-2)}
    for model, phase in (("generator", "generator"), ("embedder", "retriever")):
        of_phase = [trial for trial in record["trials"] if trial["phase"] == phase]
        best = min(of_phase, key=lambda trial: (-trial["f1"], trial["dev_loss"]))
        assert record["winner"][model] == best["rates"][model]
    tuned = trials["generator", record["winner"]["generator"]]["dev_loss"]
    starts = [trial["start_loss"] for trial in record["trials"] if trial["phase"] == "retriever"]
    assert starts == pytest.approx([tuned, tuned], rel=1e-4)
    assert record["cost"]["generator"]["seconds"] > 0
    assert record["cost"]["evaluation"]["seconds"] > 0
    search_rates(config, OPTIONS)  # the table again, and nothing else
    printed = capsys.readouterr().out
    assert f"--generator_lr={record['winner']['generator']:g}" in printed
    assert "dev_loss" in printed


def test_a_search_leaves_a_table_and_a_plot(two_phase, world):
    folder = world.folder / "search"
    assert json.loads((folder / "search.json").read_text()) == json.loads(json.dumps(two_phase[1]))
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")


def test_a_search_folder_holds_these_files_and_no_others(two_phase, world):
    folder = world.folder / "search"
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "generations.jsonl",
        "likelihoods.jsonl",
        "predictions",
        "search.json",
        "search.png",
        "trials",
    }
    assert {path.name for path in (folder / "trials").iterdir()} == {"generator-0.001", "generator-0.01"}
    for trial in (folder / "trials").iterdir():
        assert {path.name for path in trial.iterdir()} == {"checkpoints", "metrics.jsonl", "tensorboard"}
    assert {path.name for path in (folder / "predictions").glob("*.jsonl")} == {
        f"{name}.jsonl" for name in ("generator-0.001", "generator-0.01", "retriever-0.0001", "retriever-0.01")
    }


def test_answers_are_generated_once_for_a_prompt(two_phase, world):
    """As many as there are different prompts, whichever copies asked them."""
    lines = read_lines(world.folder / "search" / "generations.jsonl")
    answers = [key for line in lines for key in line]
    assert len(answers) == len(set(answers)) <= 2 * 3
    files = (world.folder / "search" / "predictions").glob("retriever-*.jsonl")
    asked = {(line["id"], *(p["id"] for p in line["passages"])) for path in files for line in read_lines(path)}
    assert len(answers) == len(asked)


def test_a_search_that_was_stopped_goes_on(two_phase, world, tmp_path, monkeypatch):
    config = searching(world, tmp_path / "stopped")
    calls = []

    def stopping(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_phase(*arguments, **options)

    monkeypatch.setattr(search_module, "train_phase", stopping)
    with pytest.raises(KeyboardInterrupt):
        search_rates(config, OPTIONS)
    monkeypatch.setattr(search_module, "train_phase", train_phase)
    record = search_rates(config, OPTIONS)
    assert record["winner"] == two_phase[1]["winner"]
    for one, other in zip(record["trials"], two_phase[1]["trials"], strict=True):
        assert one["rates"] == other["rates"]
        assert one["dev_loss"] == pytest.approx(other["dev_loss"], rel=1e-6)


def test_a_rate_that_diverges_loses(world, tmp_path, monkeypatch):
    def diverging(run, *arguments, **options):
        if run.config.generator_lr == 1e-2:
            raise DivergedError("Step 1 has a non-finite loss.")
        return train_phase(run, *arguments, **options)

    monkeypatch.setattr(search_module, "train_phase", diverging)
    options = dataclasses.replace(OPTIONS, select="dev_loss")
    record = search_rates(searching(world, tmp_path / "diverged", strategy="generator"), options)
    assert record["winner"] == {"generator": 1e-3}
    assert [trial["diverged"] for trial in record["trials"]] == [False, True]


def test_pairs_are_announced_before_they_are_trained(world, tmp_path, capsys):
    options = dataclasses.replace(OPTIONS, grid="2d", select="dev_loss", embedder_rates="1e-3")
    record = search_rates(searching(world, tmp_path / "pairs", strategy="joint"), options)
    assert [trial["rates"] for trial in record["trials"]] == [
        {"embedder": 1e-3, "generator": 1e-3},
        {"embedder": 1e-3, "generator": 1e-2},
    ]
    assert record["winner"] == min(record["trials"], key=lambda trial: trial["dev_loss"])["rates"]
    assert "2 pairs of 2 steps: about" in capsys.readouterr().out


def test_a_generator_that_is_taken_over_is_not_searched(world, tmp_path):
    """The embedder's trials are those of a search that trains the same generator itself."""
    trained = searching(world, tmp_path / "trained", strategy="generator", generator_lr=1e-2, keep="last", eval_limit=1)
    train(trained)
    own = search_rates(searching(world, tmp_path / "own", generator_lr=1e-2), OPTIONS)
    taken = search_rates(searching(world, tmp_path / "taken", generator_run=trained.run_dir), OPTIONS)
    generator, *of_own = own["trials"]
    assert generator["phase"] == "generator" and [trial["phase"] for trial in taken["trials"]] == ["retriever"] * 2
    for one, other in zip(of_own, taken["trials"], strict=True):
        assert one["rates"] == other["rates"]
        assert one["dev_loss"] == other["dev_loss"] != one["start_loss"] == other["start_loss"]
    assert taken["winner"] == {"embedder": own["winner"]["embedder"]}
    (flag,) = [flag for flag in winner_flags(taken, trained) if flag.startswith("--embedder_lr")]
    assert float(flag.split("=")[1]) == taken["winner"]["embedder"]


def test_joint_reuses_the_rates_of_the_two_phases(world, tmp_path):
    """A rate that is given is used: no generator trial but its own, no other embedder."""
    options = dataclasses.replace(OPTIONS, select="dev_loss", embedder_rates="1e-3")
    record = search_rates(searching(world, tmp_path / "joint", strategy="joint", generator_lr=1e-2), options)
    assert record["strategy"] == "joint"
    assert record["winner"] == {"generator": 1e-2, "embedder": 1e-3}
    assert [trial["phase"] for trial in record["trials"]] == ["generator", "retriever"]


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({}, {"embedder_rates": "1e-3,x"}, "--embedder_rates=1e-3,x is not a list of positive numbers"),
        ({}, {"generator_rates": "-1"}, "--generator_rates=-1 is not a list of positive numbers"),
        ({}, {"grid": "2d"}, "--grid=2d searches pairs of rates"),
        ({"strategy": "none"}, {}, "--strategy=none trains nothing"),
        ({"strategy": "independent", "embedder_run": "a", "generator_run": "b"}, {}, "leave no rate to search"),
        ({"decode": "rag_token", "temperature": 0.5}, {}, "--temperature=0.5 samples answers, which needs"),
    ],
)
def test_bad_input(world, tmp_path, changes, options, sentence):
    with pytest.raises(UserError, match=sentence):
        search_rates(searching(world, tmp_path / "bad", **changes), dataclasses.replace(OPTIONS, **options))
    assert not (tmp_path / "bad").exists()


def test_another_search_on_the_folder_is_refused(two_phase, world):
    config, _ = two_phase
    with pytest.raises(UserError, match=r"--select= \(now em\)"):
        search_rates(config, dataclasses.replace(OPTIONS, select="em"))
    with pytest.raises(UserError, match=r"--top_k=3 \(now 2\)"):
        search_rates(dataclasses.replace(config, top_k=2), OPTIONS)


def test_a_search_folder_in_use_is_refused(world, tmp_path):
    with (tmp_path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # another open file: for the system, another process
        with pytest.raises(UserError, match=f"Another process is working on {tmp_path}"):
            search_rates(searching(world, tmp_path), OPTIONS)
    assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]


def test_a_search_needs_questions_to_train_on_and_to_choose_by(world, tmp_path):
    for split in ("train", "dev"):
        splits = {name: records for name, records in questions().items() if name != split}
        data = write_data(tmp_path / split, passages(), splits)
        with pytest.raises(UserError, match=f"{data} has no {split} questions, which the search needs"):
            search_rates(searching(world, tmp_path / "run", data=str(data)), OPTIONS)
    assert not (tmp_path / "run").exists()


def test_auto_is_settled_and_the_models_are_named_before_the_search(world, tmp_path, monkeypatch, capsys):
    """The search is stopped where it would begin to train."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(search_module._Search, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        search_rates(searching(world, tmp_path / "auto", strategy="auto"), OPTIONS)
    picked, *models = capsys.readouterr().out.splitlines()
    assert picked.startswith("--strategy=auto picks independent: 12 of 12 training questions have labelled passages")
    assert models == [
        f"embedder: {load_embedder(world.embedder).describe()}",
        f"generator: {load_generator(world.generator).describe()}",
    ]


def test_a_search_does_not_go_on_with_other_models(world, tmp_path):
    """A model of the same name whose content has changed since the search was begun."""
    model = tmp_path / "bert"
    shutil.copytree(world.embedder, model)
    config = searching(world, tmp_path / "run", strategy="generator", embedder=str(model))
    record = search_rates(config, dataclasses.replace(OPTIONS, select="dev_loss", generator_rates="1e-3"))
    del record["winner"]
    (tmp_path / "run" / "search.json").write_text(json.dumps(record))
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="was begun with other models or data: bring those back or choose another"):
        search_rates(config, dataclasses.replace(OPTIONS, select="dev_loss", generator_rates="1e-3"))


@pytest.mark.parametrize("phase", [STRATEGIES["two_phase"][1], STRATEGIES["embedder"][0]], ids=lambda phase: phase.name)
def test_a_copy_that_diverges_loses_and_the_others_go_on(prepared, tmp_path, phase):
    """A rate that overflows float32 in its first update: its trial ends there, the other is as it would be alone."""
    flags = {"max_steps": 4, "ranking_batch_size": 3, "max_nonfinite_steps": 2}
    run = rerun(prepared, tmp_path / "both", **flags)
    lost, good = train_stacked(run, [1e38, 1e-4], assembler_of(run, phase)).copies
    assert lost.diverged and lost.params is None and lost.mean_loss == math.inf
    assert lost.skipped == [2, 3] and lost.steps == 3
    alone = rerun(prepared, tmp_path / "alone", **flags)
    (expected,) = train_stacked(alone, [1e-4], assembler_of(alone, phase)).copies
    assert good.steps == 4 and not good.diverged and good.skipped == []
    np.testing.assert_allclose(good.dev_losses, expected.dev_losses, rtol=1e-4)


def test_a_search_with_a_rate_that_diverges_ends_with_another(world, tmp_path):
    config = searching(world, tmp_path / "run", strategy="embedder", max_steps=3)
    record = search_rates(config, SearchConfig(embedder_rates=(1e38, 1e-4), halving=True))
    assert record["winner"] == {"embedder": 1e-4}
    assert {trial["rates"]["embedder"]: trial["diverged"] for trial in record["trials"]} == {1e38: True, 1e-4: False}


def test_rates_of_the_embedder_are_chosen_by_what_is_found(world, tmp_path):
    """Nothing is decoded, and the generator may be absent."""
    config = searching(world, tmp_path / "run", strategy="embedder", generator=str(tmp_path / "nowhere"))
    assert config.decode == "none"
    record = search_rates(config, SearchConfig(embedder_rates=(1e-2, 1e-12)))
    recalls = {trial["rates"]["embedder"]: trial["recall_at_5"] for trial in record["trials"]}
    assert None not in recalls.values()
    assert recalls[record["winner"]["embedder"]] == max(recalls.values())
    assert not list((tmp_path / "run").glob("predictions/*"))


def test_unlabelled_dev_questions_leave_the_answers_to_choose_by(world, tmp_path):
    splits = questions()
    splits["dev"] = [line | {"positive_ids": []} for line in splits["dev"]]
    data = str(write_data(tmp_path / "data", passages(), splits))
    config = searching(world, tmp_path / "run", strategy="embedder", data=data, decode="concat")
    record = search_rates(config, SearchConfig(embedder_rates=(1e-4,)))
    (trial,) = record["trials"]
    assert trial["dev_loss"] is None and trial["f1"] is not None
    with pytest.raises(UserError, match="no dev loss to choose by"):
        search_rates(searching(world, tmp_path / "b", strategy="embedder", data=data, decode="concat"), OPTIONS_BY_LOSS)
    with pytest.raises(UserError, match=r"Recall@5 is not known"):
        search_rates(searching(world, tmp_path / "c", strategy="embedder", data=data), SearchConfig())


OPTIONS_BY_LOSS = SearchConfig(select="dev_loss")


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({"dev_every": 0}, {}, "--dev_every=0 measures nothing"),
        ({"strategy": "embedder", "decode": "none"}, {"select": "f1"}, "--select=f1 needs answers"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused(world, tmp_path, changes, options, sentence):
    with pytest.raises(UserError, match=sentence):
        search_rates(searching(world, tmp_path / "run", **changes), SearchConfig(**options))
