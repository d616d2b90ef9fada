"""A whole comparison on tiny models: the same runs as one by one, what they share, what fails, going on."""

import csv
import dataclasses
import itertools
import json
import math
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ragjax
from ragjax.comparison import Execution, plan_cells
from ragjax.comparison import execution as execution_module
from ragjax.config import ROWS, CompareConfig, RunConfig
from ragjax.errors import DivergedError, UserError
from ragjax.fields import changed_flags
from ragjax.files import read_json
from ragjax.runs import RunFolder
from ragjax.stopping import Terminated
from ragjax.training import run as run_module
from ragjax.training import train
from tests.tiny import write_tiny_llama, write_tiny_mpnet
from tests.tiny_runs import World, passages, questions, read_lines, tiny_world, write_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


def shared(world: World, folder, **changes) -> RunConfig:
    return world.config(folder, **{"max_steps": 2, "dev_every": 1, "keep": "best", "eval_limit": 4} | changes)


# Where it does not matter what is learnt.
QUICK = {"max_steps": 1, "keep": "last", "dev_every": 0, "eval_limit": 1}


def options(world: World, **changes) -> CompareConfig:
    return CompareConfig(**{"embedders": str(world.embedder), "generators": str(world.generator)} | changes)


def cell_of(folder, row: str, seed: int = 0) -> RunFolder:
    return RunFolder(Path(folder)).cell("bert-llama", f"seed{seed}", row)


def reported(folder) -> dict[tuple[str, str], dict[str, str]]:
    """The lines of report.csv, by row and seed."""
    with (Path(folder) / "report.csv").open(newline="", encoding="utf-8") as file:
        return {(line["row"], line["seed"]): line for line in csv.DictReader(file)}


@pytest.fixture(scope="module")
def whole(world):
    """Every row, with one seed; how often the test questions were answered."""
    answered = []
    evaluate = run_module.evaluate

    def counted(pipeline, asked, path, *arguments, **others):
        answered.append(path.exists())
        return evaluate(pipeline, asked, path, *arguments, **others)

    config = shared(world, world.folder / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "evaluate", counted)
        report = ragjax.compare(config, options(world))
    return config, report, answered


@pytest.mark.parametrize("row", ["none", "independent", "two_phase", "rag_token"])
def test_a_cell_is_the_run_by_itself_and_costs_what_that_costs(whole, world, tmp_path, row):
    """Answers to the byte; FLOPs and tokens of every part, also of what a cell has taken over."""
    config, _, _ = whole
    (cell,) = [cell for cell in plan_cells(config, options(world)) if cell.row == row]
    alone = train(dataclasses.replace(cell.config, run_dir=str(tmp_path / row)))
    own = cell.files.read_summary()
    for moment in ("before", "after") if row != "none" else ("before",):
        paths = [files.measured("test", moment) for files in (cell.files, RunFolder(tmp_path / row))]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    if row.startswith("rag_"):
        assert cell.files.metrics_file.read_bytes() == (tmp_path / row / "metrics.jsonl").read_bytes()
    assert (own.before, own.after, own.kept) == (alone.before, alone.after, alone.kept)
    for part in ("embedder", "generator", "search", "encode", "evaluation"):
        for unit in ("flops", "tokens", "backward_tokens"):
            assert own.cost[part][unit] == pytest.approx(alone.cost[part][unit], rel=1e-12), (part, unit)
    assert (own.cost["seconds"] > 0) == (alone.cost["seconds"] > 0)


def test_untrained_models_answer_once_and_models_are_tuned_once(whole):
    config, _, answered = whole
    # Before: asked by each of the seven rows, answered for the first one. After: by the six that train.
    assert answered.count(False) == 1 + 6 and len(answered) == 7 + 6
    sources = {
        row: [
            read_json(cell_of(config.run_dir, row).config_file)["flags"][flag]
            for flag in ("embedder_run", "generator_run")
        ]
        for row in ROWS
    }
    at = {row: str(cell_of(config.run_dir, row).path) for row in ROWS}
    assert sources.pop("independent") == [at["embedder"], at["generator"]]
    assert sources.pop("two_phase") == ["", at["generator"]]
    assert set(map(tuple, sources.values())) == {("", "")}
    phases = {line["phase"] for line in read_lines(cell_of(config.run_dir, "two_phase").metrics_file)}
    assert phases == {"retriever"}


def test_the_report_says_what_the_cells_say(whole):
    config, report, _ = whole
    lines = reported(config.run_dir)
    assert [row for row, _ in lines] == list(ROWS)
    for (row, _), line in lines.items():
        summary = cell_of(config.run_dir, row).read_summary()
        assert float(line["recall_at_5_after"]) == pytest.approx(summary.after["recall_at_5"])
        assert float(line["seconds"]) == pytest.approx(summary.cost["seconds"])
        assert line["failure"] == ""
    assert report.html.is_file() and report.advice


def test_a_finished_comparison_is_reported_again_and_nothing_is_run(whole, world, monkeypatch, capsys):
    config, report, _ = whole
    monkeypatch.setattr(run_module, "run_phases", None)
    monkeypatch.setattr(execution_module, "load_untrained_embedder", None)
    again = ragjax.compare(config, options(world))
    assert again.findings == report.findings
    assert "No Ft." in capsys.readouterr().out


def test_rows_and_seeds_can_be_added_later(whole, world, monkeypatch):
    """What is there stays; what is new takes over from its own seed."""
    config, _, _ = whole
    kept = {path: path.read_bytes() for path in Path(config.run_dir).rglob("summary.json")}
    more = options(world, strategies="none,generator,two_phase", seeds="0,1")
    ragjax.compare(config, more)
    assert {path: path.read_bytes() for path in kept} == kept
    assert list(reported(config.run_dir)) == [
        ("none", "0"), ("generator", "0"), ("generator", "1"), ("two_phase", "0"), ("two_phase", "1")
    ]  # fmt: skip
    second = read_json(cell_of(config.run_dir, "two_phase", seed=1).config_file)["flags"]
    assert second["generator_run"] == str(cell_of(config.run_dir, "generator", seed=1).path)
    # The untrained models are the same ones whatever the seed.
    before = [cell_of(config.run_dir, "generator", seed).measured("test", "before") for seed in (0, 1)]
    assert before[0].with_suffix(".cost.json").read_bytes() == before[1].with_suffix(".cost.json").read_bytes()
    after = [cell_of(config.run_dir, "generator", seed).read_summary().kept["generator"]["figures"] for seed in (0, 1)]
    assert after[0] != after[1]


def test_what_fails_is_shown_and_the_others_go_on_then_and_later(world, tmp_path, monkeypatch, capsys):
    """First the embedder diverges and the generator meets a fault; the second time both end well."""
    config = shared(world, tmp_path / "cmp", **QUICK)
    chosen = options(world, strategies="none,embedder,generator,independent")
    complete = run_module.complete

    def failing(its, prepared=None):
        if its.strategy == "embedder":
            raise DivergedError("Step 2 has a non-finite loss: lower --embedder_lr in a new --run_dir.")
        if its.strategy == "generator":
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile running")
        return complete(its, prepared)

    monkeypatch.setattr(execution_module, "complete", failing)
    ragjax.compare(config, chosen)
    printed = capsys.readouterr()
    lines = reported(config.run_dir)
    assert lines["embedder", "0"]["failure"].startswith("Step 2 has a non-finite loss")
    trace = cell_of(config.run_dir, "generator").path / "error.txt"
    sentence = f"RuntimeError: RESOURCE_EXHAUSTED: Out of memory (the traceback is in {trace})"
    assert lines["generator", "0"]["failure"] == sentence
    assert "in failing" in trace.read_text()
    assert "Ft. Embed. has no result: Step 2 has a non-finite loss" in printed.out
    assert lines["independent", "0"]["failure"] == lines["none", "0"]["failure"] == ""
    kept = cell_of(config.run_dir, "independent").summary_file.read_bytes()
    monkeypatch.setattr(execution_module, "complete", complete)
    ragjax.compare(config, chosen)
    assert {line["failure"] for line in reported(config.run_dir).values()} == {""}
    # It has trained models of its own, and now that there are others it is still the same run.
    assert cell_of(config.run_dir, "independent").summary_file.read_bytes() == kept


def test_sigterm_in_a_run_ends_the_whole_comparison(world, tmp_path, monkeypatch):
    """It is no failure of that run, after which the next one would begin."""
    asked = []

    def stopped(its, prepared=None):
        asked.append(its.strategy)
        raise Terminated

    monkeypatch.setattr(execution_module, "complete", stopped)
    with pytest.raises(Terminated):
        ragjax.compare(shared(world, tmp_path / "cmp", **QUICK), options(world, strategies="none,embedder"))
    assert asked == ["none"] and not (tmp_path / "cmp" / "report.html").exists()


def test_rows_that_need_labels_say_so_where_there_are_none(world, tmp_path):
    splits = {split: [q | {"positive_ids": []} for q in those] for split, those in questions().items()}
    data = write_data(tmp_path / "unlabelled", passages(), splits)
    config = shared(world, tmp_path / "cmp", data=str(data), **QUICK)
    ragjax.compare(config, options(world, strategies="none,embedder,independent"))
    lines = reported(config.run_dir)
    for row in ("embedder", "independent"):
        assert "positive_ids" in lines[row, "0"]["failure"]
    assert lines["none", "0"]["failure"] == "" and lines["none", "0"]["recall_at_5_after"] == ""


def test_retrieval_alone_needs_neither_answers_nor_a_generator(world, tmp_path, monkeypatch):
    splits = {split: [q | {"answers": []} for q in those] for split, those in questions().items()}
    data = write_data(tmp_path / "unanswered", passages(), splits)
    monkeypatch.setattr(execution_module, "load_untrained_generator", None)
    config = shared(world, tmp_path / "cmp", data=str(data), decode="none", max_steps=1)
    report = ragjax.compare(config, options(world, strategies="none,embedder"))
    lines = reported(config.run_dir)
    assert {line["failure"] for line in lines.values()} == {""}
    assert lines["embedder", "0"]["f1_after"] == "" and float(lines["embedder", "0"]["recall_at_5_after"]) > 0
    (pair,) = report.findings.pairs
    assert pair.metric == "recall_at_5"


def test_each_seed_begins_with_adapters_of_its_own(world, tmp_path):
    """Also where another seed's cell was the first one to be prepared."""
    config = shared(world, tmp_path / "cmp", **QUICK)
    ragjax.compare(config, options(world, strategies="none,generator", seeds="1,0"))
    for seed in (0, 1):
        (cell,) = [c for c in plan_cells(config, options(world, seeds=str(seed))) if c.row == "generator"]
        train(dataclasses.replace(cell.config, run_dir=str(tmp_path / f"alone{seed}")))
        alone = (tmp_path / f"alone{seed}" / "metrics.jsonl").read_bytes()
        assert cell.files.metrics_file.read_bytes() == alone


def test_a_cell_that_was_edited_is_refused_and_the_others_are_reported(world, tmp_path):
    config, chosen = shared(world, tmp_path / "cmp", **QUICK), options(world, strategies="none,embedder")
    ragjax.compare(config, chosen)
    edited = cell_of(config.run_dir, "embedder").config_file
    content = read_json(edited)
    content["flags"]["ranking_scale"] = 7.0
    for text, sentence in (
        (json.dumps(content), "holds a run with --ranking_scale=7.0 (now 20.0)"),
        ("{}", "does not describe a run of this version"),
    ):
        edited.write_text(text, encoding="utf-8")
        ragjax.compare(config, chosen)
        lines = reported(config.run_dir)
        assert sentence in lines["embedder", "0"]["failure"]
        assert lines["none", "0"]["failure"] == ""


def test_rates_are_searched_inside(world, tmp_path):
    """Labels by Recall@5, answers by the dev loss, over the generator that the comparison has tuned."""
    config = shared(world, tmp_path / "cmp", **QUICK | {"dev_every": 1}, embedder_lr=None)
    rates = (1e-4, 1e-2)
    chosen = options(world, strategies="embedder,generator,two_phase", search=True, embedder_rates=rates)
    ragjax.compare(config, chosen)
    found = {
        kind: read_json(RunFolder(Path(config.run_dir)).search("bert-llama", kind).search_file)
        for kind in ("labels", "answers")
    }
    losses = {trial["rates"]["embedder"]: trial["dev_loss"] for trial in found["answers"]["trials"]}
    assert set(losses) == set(rates) and found["answers"]["winner"] == {"embedder": min(losses, key=losses.get)}
    recalls = {trial["rates"]["embedder"]: trial["recall_at_5"] for trial in found["labels"]["trials"]}
    assert recalls[found["labels"]["winner"]["embedder"]] == max(recalls.values())
    assert found["answers"]["flags"]["generator_run"] == str(cell_of(config.run_dir, "generator").path)
    used = {
        row: read_json(cell_of(config.run_dir, row).config_file)["flags"]["embedder_lr"] for row in chosen.strategies
    }
    winners = {kind: search["winner"]["embedder"] for kind, search in found.items()}
    assert used == {"embedder": winners["labels"], "generator": None, "two_phase": winners["answers"]}
    ragjax.compare(config, chosen)  # finds its searches and runs again


def test_a_plan_is_printed_and_nothing_is_written(world, tmp_path, capsys):
    config = shared(world, tmp_path / "cmp")
    assert ragjax.compare(config, options(world, seeds="0,1", dry_run=True)) is None
    printed = capsys.readouterr().out
    assert "13 of 13 runs are left" in printed
    assert "rag_token of bert-llama, seed 1" in printed
    assert "In all about" in printed and "GB of disk" in printed and "GB of memory" in printed
    assert not (tmp_path / "cmp").exists()


def test_a_disk_that_is_too_small_is_met_before_anything_is_trained(world, tmp_path, monkeypatch):
    monkeypatch.setattr(execution_module, "free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match=r"the comparison needs 0\.0 GB in .*, where 0\.0 GB are free: free some"):
        ragjax.compare(shared(world, tmp_path / "cmp"), options(world))
    assert not (tmp_path / "cmp" / "cells").exists()


def test_the_disk_that_is_asked_for_is_enough(whole, world):
    """Checkpoints take nearly all of it; of models this small other files are as large, so a bound is added."""
    config, _, _ = whole
    cells = plan_cells(config, options(world))
    execution = Execution(config, options(world), cells, ragjax.open_run(cells[0].files.path).dataset)
    for cell in cells:
        cell.files.summary_file.rename(cell.files.summary_file.with_suffix(".hidden"))
    try:
        execution.plan()
    finally:
        for cell in cells:
            cell.files.summary_file.with_suffix(".hidden").rename(cell.files.summary_file)
    for cell in cells:
        stored = sum(
            p.stat().st_size
            for name in ("checkpoints", "best")
            for p in (cell.files.path / name).rglob("*")
            if p.is_file()
        )
        asked = execution._paces[cell.pair].cell_bytes(cell)
        assert stored <= 1.2 * asked + 2e5, cell.row


@pytest.mark.parametrize(
    ("changes", "chosen", "sentence"),
    [
        ({"top_k": 2}, {}, r"whole holds a comparison with --top_k=3 \(now 2\): repeat that flag or choose another"),
        ({}, {"search": True}, r"whole holds a comparison with --search=False \(now True\)"),
        ({"data": "nowhere"}, {}, "--data="),
    ],
)
def test_a_folder_of_another_comparison_is_refused(whole, world, changes, chosen, sentence):
    config, _, _ = whole
    before = {path: path.read_bytes() for path in Path(config.run_dir).rglob("*.json")}
    with pytest.raises(UserError, match=sentence):
        ragjax.compare(dataclasses.replace(config, **changes), options(world, **chosen))
    assert {path: path.read_bytes() for path in Path(config.run_dir).rglob("*.json")} == before


def test_a_comparison_without_any_result_ends_with_the_reason(world, tmp_path, capsys):
    config = shared(world, tmp_path / "cmp", top_k=99)
    with pytest.raises(UserError, match=r"no run has a result: --top_k=99 is more than the 30 passages: lower it\."):
        ragjax.compare(config, options(world, strategies="none,embedder"))
    assert reported(config.run_dir)["none", "0"]["failure"] == "--top_k=99 is more than the 30 passages: lower it."
    assert "No run has a result" in capsys.readouterr().out


def test_the_folder_of_a_run_is_no_place_for_a_comparison(whole, world):
    config, _, _ = whole
    with pytest.raises(UserError, match=r"generator holds a run: choose another --run_dir for the comparison"):
        ragjax.compare(
            dataclasses.replace(config, run_dir=str(cell_of(config.run_dir, "generator").path)), options(world)
        )


def test_a_search_needs_dev_questions(world, tmp_path):
    splits = questions()
    del splits["dev"]
    data = write_data(tmp_path / "data", passages(), splits)
    with pytest.raises(UserError, match=r"has no dev questions, by which --search chooses: add dev\.jsonl"):
        ragjax.compare(shared(world, tmp_path / "cmp", data=str(data)), options(world, search=True))


def test_all_four_kinds_of_pipelines_are_compared(world):
    write_tiny_mpnet(world.folder / "mpnet")
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 40}
    write_tiny_llama(world.folder / "mistral", seed=3, **mistral)
    config = shared(world, world.folder / "four", **QUICK)
    kinds = {
        name: [str(world.folder / kind) for kind in those]
        for name, those in {"embedders": ("bert", "mpnet"), "generators": ("llama", "mistral")}.items()
    }
    report = ragjax.compare(config, CompareConfig(strategies="none,rag_sequence,rag_token", **kinds))
    assert [(pair.embedder, pair.generator) for pair in report.findings.pairs] == list(
        itertools.product(*kinds.values())
    )
    losses = {}
    for pair in report.findings.pairs:
        assert [row.row for row in pair.rows if row.is_measured and not row.failures] == [
            "none",
            "rag_sequence",
            "rag_token",
        ]
        for row in pair.rows[1:]:
            (line,) = [line for line in read_lines(Path(row.cells[0].folder) / "metrics.jsonl") if line["step"] == 1]
            losses[pair.embedder, pair.generator, row.row] = line["loss"]
    assert len(set(losses.values())) == 8 and all(map(math.isfinite, losses.values()))


def test_kills_at_random_moments_end_in_the_same_table(world):
    """The command, killed without warning again and again, until a run of it comes to its end."""
    config = shared(world, world.folder / "killed", max_steps=2, eval_limit=2)
    chosen = options(world, strategies="none,embedder,generator")
    flags = [*changed_flags(config, RunConfig()), *changed_flags(chosen, CompareConfig())]
    decided = ("strategy", "embedder", "generator", "seed")
    command = [sys.executable, "-m", "ragjax.compare"] + [
        flag for flag in flags if not flag.startswith(tuple(f"--{name}=" for name in decided))
    ]
    draw, kills = random.Random(4), 0
    while True:
        process = subprocess.Popen(
            command, cwd=world.folder, env=world.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        wait = draw.uniform(3, 12) if kills < 4 else 900
        try:
            _, errors = process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, errors.decode()[-2000:]
        break
    assert kills >= 3
    undisturbed = dataclasses.replace(config, run_dir=str(world.folder / "undisturbed"))
    ragjax.compare(undisturbed, chosen)
    tables = [reported(folder) for folder in (config.run_dir, undisturbed.run_dir)]
    for table in tables:
        for line in table.values():
            for name in [
                name for name in line if "seconds" in name or name in ("folder", "relative_cost", "peak_memory_bytes")
            ]:
                del line[name]
    assert tables[0] == tables[1]
