"""ragjax.training.run: whole runs on tiny models, from their flags to their summary."""

import dataclasses
import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ragjax.checkpoints import Checkpoints
from ragjax.config import OBJECTIVES, EvaluateConfig, RunConfig
from ragjax.costs import PARTS, TRAINING_PARTS
from ragjax.data.dataset import load_dataset
from ragjax.errors import UserError
from ragjax.evaluation import evaluate_runs
from ragjax.exporting import export_run
from ragjax.pipeline import Pipeline, load_models
from ragjax.pretrained import load_embedder, load_generator
from ragjax.runs import Summary, open_run
from ragjax.runs import run as run_module_of_runs
from ragjax.training import run as run_module
from ragjax.training import train
from ragjax.training.sampling import question_order, total_steps
from ragjax.training.signals import AnswerAssembler
from ragjax.training.signals.question_side import QuestionSide
from tests.tiny_runs import PLACES, changed, flat, passages, questions, read_lines, tiny_world, write_data

METRICS = {"em", "f1", "contains", "recall_at_5", "hit_at_5"}
UNITS = {"seconds", "flops", "tokens", "backward_tokens"}
RECORD = {"id", "question", "prediction", "answers", "em", "f1", "contains", "recall_at_5", "hit_at_5", "passages"}
RECORD |= {"log_prob", "mrr_at_10", "answer_in_context"}
RECORD |= {
    f"{name}_at_{rank}" for name in ("recall", "hit") for rank in (1, 3, 5, 10, 20)
}  # these runs read 3 passages


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        yield world


@dataclasses.dataclass
class Finished:
    """A run that has ended, and what was seen of its inside."""

    config: RunConfig
    folder: Path
    summary: Summary | None
    pipelines: list[Pipeline]  # that were evaluated: before, after
    embedders: list[Any]  # the embedder's variables at each retrieval of training and dev
    found: list[tuple[tuple[str, ...], Any]]  # (questions, passage rows) at each of them

    def lines(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "metrics.jsonl")


def finish(config: RunConfig) -> Finished:
    """Runs to the end, watching retrieval and evaluation."""
    finished = Finished(config, Path(config.run_dir), None, [], [], [])
    evaluate, vectors, with_passages = run_module.evaluate, QuestionSide.vectors, AnswerAssembler.with_passages

    def watched_evaluate(pipeline, *arguments, **options):
        finished.pipelines.append(pipeline)
        return evaluate(pipeline, *arguments, **options)

    def watched_vectors(self, batch, variables):
        finished.embedders.append(jax.device_get(variables["embedder"]))
        return vectors(self, batch, variables)

    def watched_with_passages(self, asked, rows):
        finished.found.append((tuple(question.id for question in asked.questions), np.array(rows)))
        return with_passages(self, asked, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "evaluate", watched_evaluate)
        patch.setattr(QuestionSide, "vectors", watched_vectors)
        patch.setattr(AnswerAssembler, "with_passages", watched_with_passages)
        finished.summary = train(config)
    return finished


@pytest.fixture(scope="module")
def joint(world) -> Finished:
    """rag_token, adapters of rank 4; the embedder's rate is high, so that what it finds changes."""
    return finish(world.config(world.folder / "joint", embedder_lr=0.03))


@pytest.fixture(scope="module")
def overfit(world) -> Finished:
    """rag_sequence, all weights trained, on the four questions of a small data set, for 20 steps."""
    splits = questions()
    splits["train"] = splits["train"][:4]
    data = write_data(world.folder / "few", passages(), splits)
    return finish(
        world.config(
            world.folder / "overfit",
            data=str(data),
            objective="rag_sequence",
            lora_rank=0,
            batch_size=4,
            max_steps=20,
            dev_every=0,
            checkpoint_every=50,
        )
    )


@pytest.fixture(scope="module")
def generator_only(world) -> Finished:
    """concat_nll with the embedder as it is."""
    return finish(world.config(world.folder / "generator", strategy="generator", objective="concat_nll", max_steps=3))


@pytest.fixture(scope="module", params=["joint", "overfit", "generator_only"])
def trained(request) -> Finished:
    """Each of the runs that train something."""
    return request.getfixturevalue(request.param)


def load_checkpoint(finished: Finished) -> tuple[int, dict[str, Any]]:
    checkpoints = Checkpoints(finished.folder / "checkpoints" / finished.config.strategy)
    step, trees, _ = checkpoints.restore({"trainable": None})
    return step, trees["trainable"]


def test_config_json_says_what_the_run_was_made_from(trained):
    record = json.loads((trained.folder / "config.json").read_text())
    assert record["flags"] == json.loads(json.dumps(dataclasses.asdict(trained.config)))
    assert {name: len(entry["sha256"]) for name, entry in record["inputs"].items()} == {
        "embedder": 64,
        "generator": 64,
        "data": 64,
    }
    assert record["index"]["type"] == "Flat"
    assert {"ragjax", "jax", "flax", "optax", "faiss-cpu"} <= record["versions"].keys()


def test_a_run_folder_holds_these_files_and_no_others(trained):
    strategy, measured = trained.config.strategy, ("before", "after")
    assert {path.name for path in trained.folder.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "predictions",
        "report.html",
        "summary.json",
        "tensorboard",
    }
    assert {path.name for path in (trained.folder / "predictions").iterdir()} == {
        f"test.{moment}.{ending}" for moment in measured for ending in ("jsonl", "cost.json")
    }
    for folder in ("checkpoints", "tensorboard"):
        assert [path.name for path in (trained.folder / folder).iterdir()] == [strategy]


def test_metrics_hold_each_step_once_in_order(trained):
    lines, steps = trained.lines(), trained.config.max_steps
    first = 0 if trained.config.dev_every else 1
    assert [line["step"] for line in lines] == list(range(first, steps + 1))
    assert {line["phase"] for line in lines} == {trained.config.strategy}
    for line in lines[1 - first :]:
        assert all(math.isfinite(value) for key, value in line.items() if key != "phase")
        assert line["questions"] == trained.config.batch_size
        assert line["nll_per_answer"] > line["nll_per_token"] > 0  # every answer has its end token besides
        assert 1 <= line["distinct_passages"] <= trained.config.batch_size * trained.config.top_k
        assert not any("second" in key for key in line)  # timings would differ after a resume


def test_dev_figures_stand_at_the_start_every_n_steps_and_at_the_end(joint, generator_only):
    def steps(finished):
        return [line["step"] for line in finished.lines() if "dev_nll_per_answer" in line]

    assert steps(joint) == [0, 2, 4]
    assert steps(generator_only) == [0, 2, 3]  # the end is no multiple of 2
    assert all(line["dev_nll_per_token"] > 0 for line in joint.lines() if line["step"] in (0, 2, 4))


def test_no_dev_figures_where_they_are_switched_off(overfit):
    assert not any(key.startswith("dev_") for line in overfit.lines() for key in line)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_predictions_have_a_line_for_every_question_in_file_order(trained, moment):
    records = read_lines(trained.folder / "predictions" / f"test.{moment}.jsonl")
    asked = questions()["test"]
    assert [(r["id"], r["question"], r["answers"]) for r in records] == [
        (q["id"], q["question"], q["answers"]) for q in asked
    ]
    known = {f"p{i}" for i in range(len(PLACES))}
    for record in records:
        assert record.keys() == RECORD
        assert 0 <= record["em"] <= record["f1"] <= 1
        assert "\n" not in record["prediction"]
        assert record["prediction"] == record["prediction"].strip()
        shares = [passage["probability"] for passage in record["passages"]]
        assert len(shares) == trained.config.top_k
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1)
        assert record["log_prob"] < 0
        assert {passage["id"] for passage in record["passages"]} <= known
    scores = getattr(trained.summary, moment)
    assert scores == {name: pytest.approx(np.mean([record[name] for record in records]), abs=1e-12) for name in METRICS}


def test_summary_has_the_schema_of_the_contract(trained):
    config, summary = trained.config, trained.summary
    assert json.loads((trained.folder / "summary.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(summary))
    )
    contract = {"strategy", "objective", "split", "n", "before", "after", "cost", "peak_memory_bytes", "retrieval"}
    added = {"change_95", "strategy_costs", "skipped_questions", "skipped_steps", "kept", "step_share"}
    assert dataclasses.asdict(summary).keys() == contract | added
    assert summary.skipped_steps == {config.strategy: 0}
    assert summary.step_share.keys() == {config.strategy}
    assert 0 < summary.step_share[config.strategy] < 1
    assert (summary.strategy, summary.objective) == (config.strategy, config.objective)
    assert (summary.split, summary.n) == ("test", 6)
    for moment in ("before", "after"):
        assert getattr(summary, moment).keys() == METRICS
        assert all(0 <= value <= 1 for value in getattr(summary, moment).values())
    assert summary.peak_memory_bytes > 1 << 20


def test_cost_at_the_top_is_training_without_evaluation(trained):
    cost = trained.summary.cost
    assert cost.keys() == {*UNITS, *PARTS, "phases"}
    for unit in UNITS:
        assert cost[unit] == pytest.approx(sum(cost[part][unit] for part in TRAINING_PARTS))
        assert cost["evaluation"][unit] > 0 or unit == "backward_tokens"
    steps = [line for line in trained.lines() if line["step"]]
    assert cost["generator"]["tokens"] == sum(line["generator_tokens"] for line in steps)
    assert all(cost[part]["seconds"] > 0 and cost[part]["flops"] > 0 for part in TRAINING_PARTS)
    assert cost["search"]["tokens"] == 0


def test_training_changes_both_models_and_only_what_it_may(joint):
    """Every leaf of the embedder and of the adapters moves; the generator's own weights stay, bit for bit."""
    embedder, generator = load_models(joint.config)
    before, after = joint.pipelines
    assert changed(embedder.params, before.embedder.params) == set()  # the step's donation left these alone
    assert changed(generator.lora, before.generator.lora) == set()
    moved = changed(embedder.params, after.embedder.params)
    assert moved == {name for name in flat(embedder.params) if "key/bias" not in name} | (moved & {*key_biases(moved)})
    assert changed(generator.lora, after.generator.lora) == set(flat(generator.lora))
    assert changed(generator.params, before.generator.params) == set()
    assert changed(generator.params, after.generator.params) == set()


def key_biases(names: set[str]) -> set[str]:
    """A key's bias shifts all scores of a query alike, so its gradient is rounding noise: it may stay or move."""
    return {name for name in names if "key/bias" in name}


def test_the_checkpoint_holds_what_was_trained_and_no_frozen_base(joint):
    step, trees = load_checkpoint(joint)
    assert step == joint.config.max_steps
    assert {model: set(collections) for model, collections in trees.items()} == {
        "embedder": {"params"},
        "generator": {"lora"},
    }
    after = joint.pipelines[1]
    assert changed(trees["embedder"]["params"], after.embedder.params) == set()
    assert changed(trees["generator"]["lora"], after.generator.lora) == set()


def test_full_fine_tuning_changes_every_weight_of_the_generator(overfit):
    _, generator = load_models(overfit.config)
    assert generator.lora is None
    assert changed(generator.params, overfit.pipelines[1].generator.params) == set(flat(generator.params))


def test_generator_training_leaves_the_embedder_alone(generator_only):
    embedder, generator = load_models(generator_only.config)
    after = generator_only.pipelines[1]
    assert changed(embedder.params, after.embedder.params) == set()
    assert changed(generator.lora, after.generator.lora) == set(flat(generator.lora))
    assert load_checkpoint(generator_only)[1].keys() == {"generator"}


def test_a_run_that_was_opened_again_is_the_one_that_was_trained(joint):
    opened = open_run(joint.folder)
    after = joint.pipelines[1]
    assert opened.step == 4
    assert changed(opened.pipeline.embedder.params, after.embedder.params) == set()
    assert changed(opened.pipeline.generator.variables, after.generator.variables) == set()


def test_the_loss_falls_when_a_few_questions_are_repeated(overfit):
    losses = [line["loss"] for line in overfit.lines()]
    assert len(losses) == 20
    assert np.mean(losses[-3:]) < 0.5 * losses[0]


def test_joint_training_retrieves_with_the_embedder_as_it_is(joint):
    """Dev loss, steps 1 and 2, dev loss, steps 3 and 4, dev loss; the three dev questions are two batches."""
    baseline = joint.pipelines[0].embedder.variables
    moved = [bool(changed(baseline, variables)) for variables in joint.embedders]
    assert moved == [False] * 3 + [True] * (len(moved) - 3)
    assert len(moved) == 3 * 2 + 4
    first, last = joint.found[0], joint.found[-2]
    assert first[0] == last[0] == ("dev-12", "dev-13")
    assert not np.array_equal(first[1], last[1])


def test_other_strategies_retrieve_with_the_baseline(generator_only):
    """Which finds the passages of all questions at once, and never by the step's variables."""
    pipeline, dataset = generator_only.pipelines[0], load_dataset(generator_only.config.data)
    texts = {question.id: question.question for question in (*dataset.train, *dataset.dev)}
    assert generator_only.embedders == []
    assert len(generator_only.found) == 3 * 2 + 3
    for ids, rows in generator_only.found:
        expected = pipeline.retrieve([texts[identity] for identity in ids], rows.shape[1]).passage_rows
        np.testing.assert_array_equal(rows, expected)


def test_tensorboard_events_show_the_losses(joint):
    (events,) = (joint.folder / "tensorboard" / "joint").iterdir()
    content = events.read_bytes()
    for tag in (b"loss", b"dev_nll_per_answer", b"tokens_per_second", b"embedder_grad_norm"):
        assert tag in content


def test_the_rates_follow_the_schedule_of_each_model(joint):
    lines = [line for line in joint.lines() if line["step"]]
    for model, peak in (("embedder", 0.03), ("generator", 1e-2)):
        rates = [line[f"{model}_lr"] for line in lines]
        assert rates == pytest.approx([peak, 0.75 * peak, 0.5 * peak, 0.25 * peak])


def test_batches_made_ahead_are_those_made_in_their_turn(generator_only, world, monkeypatch):
    """A frozen embedder's are made while the step before is computed; the joint ones wait for its embedder."""
    monkeypatch.setattr(AnswerAssembler, "looks_ahead", False)
    in_turn = finish(dataclasses.replace(generator_only.config, run_dir=str(world.folder / "in turn")))
    assert (in_turn.folder / "metrics.jsonl").read_bytes() == (generator_only.folder / "metrics.jsonl").read_bytes()
    for unit in ("flops", "tokens", "backward_tokens"):
        costs = [run.summary.cost["phases"]["generator"] for run in (in_turn, generator_only)]
        assert {part: costs[0][part][unit] for part in PARTS} == {part: costs[1][part][unit] for part in PARTS}
    # The dev questions of a measurement come between a step and the next: what is made ahead is made before them.
    orders = [[ids for ids, _ in run.found] for run in (generator_only, in_turn)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_a_finished_run_prints_its_table_and_does_nothing_else(joint, monkeypatch, capsys):
    def files():
        return {path: path.stat().st_mtime_ns for path in joint.folder.rglob("*") if path.name != ".lock"}

    for name in ("load_dataset", "prepare", "run_phases"):
        monkeypatch.setattr(run_module, name, None)
    before = files()
    again = dataclasses.asdict(train(joint.config))
    assert again == json.loads(json.dumps(dataclasses.asdict(joint.summary)))
    assert files() == before
    printed = capsys.readouterr().out
    for words in ("before", "after", "recall_at_5", "evaluation (apart)", "ragjax.ask", "ragjax.evaluate"):
        assert words in printed


@pytest.mark.parametrize("is_there", [False, True])
def test_the_next_commands_can_be_pasted(joint, tmp_path, monkeypatch, capsys, is_there):
    monkeypatch.setattr(run_module, "find_spec", lambda name: object() if is_there else None)
    folder = tmp_path / "my run"
    shutil.copytree(joint.folder, folder)
    train(dataclasses.replace(joint.config, run_dir=str(folder)))
    commands = [shlex.split(line) for line in capsys.readouterr().out.partition("Next:")[2].splitlines() if line]
    run_dir = f"--run_dir={folder}"
    assert commands[:3] == [
        ["python", "-m", "ragjax.ask", run_dir, "your question"],
        ["python", "-m", "ragjax.evaluate", run_dir, "--split=test"],
        ["python", "-m", "ragjax.export", run_dir, "--out=exported"],
    ]
    install = [] if is_there else ["pip", "install", "tensorboard", "&&"]
    assert commands[3:] == [[*install, "python", "-m", "tensorboard.main", f"--logdir={folder / 'tensorboard'}"]]


@pytest.mark.parametrize(("flag", "value"), [("generator_lr", 5e-3), ("eval_limit", 2), ("top_k", 4)])
def test_another_configuration_on_a_run_folder_is_refused(joint, flag, value):
    with pytest.raises(UserError, match=rf"--{flag}=.* \(now {value}\)") as caught:
        train(dataclasses.replace(joint.config, **{flag: value}))
    assert str(joint.folder) in str(caught.value)


def test_a_run_folder_may_be_moved(joint, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(joint.folder)
    assert train(dataclasses.replace(joint.config, run_dir=str(moved))).n == 6


def test_none_measures_the_models_as_they_are(world, capsys):
    """Having said first what it is made from."""
    finished = finish(world.config(world.folder / "none", strategy="none", eval_split="dev", eval_limit=3))
    data = load_dataset(world.data)
    assert capsys.readouterr().out.splitlines()[:4] == [
        f"embedder: {load_embedder(world.embedder).describe()}",
        f"generator: {load_generator(world.generator).describe()}",
        f"data: data, 30 passages, 12 / 4 / 6 questions, sha256 {data.sha256[:12]}",
        "",
    ]
    assert finished.summary.split == "dev"
    assert finished.summary.n == 3
    assert finished.summary.before == finished.summary.after
    assert finished.summary.cost["generator"] == dict.fromkeys(UNITS, 0)
    assert finished.summary.cost["phases"] == {}
    assert finished.summary.cost["tokens"] == finished.summary.cost["encode"]["tokens"] > 0
    assert [record["id"] for record in read_lines(finished.folder / "predictions" / "dev.before.jsonl")] == [
        question["id"] for question in questions()["dev"][:3]
    ]
    assert not (finished.folder / "metrics.jsonl").exists()


def test_recall_of_unlabelled_questions_is_null(world):
    splits = {split: [record | {"positive_ids": []} for record in records] for split, records in questions().items()}
    data = write_data(world.folder / "unlabelled", passages(), splits)
    summary = train(world.config(world.folder / "unlabelled-run", strategy="none", data=str(data), eval_limit=2))
    assert summary.before["recall_at_5"] is None
    assert summary.after["hit_at_5"] is None
    assert summary.before["f1"] is not None


def test_an_objective_without_gradient_for_the_embedder_is_refused(world, tmp_path):
    assert "concat_nll" in OBJECTIVES
    with pytest.raises(UserError, match="--objective=concat_nll gives the embedder no gradient"):
        train(world.config(tmp_path / "run", objective="concat_nll"))


def test_every_epoch_asks_every_question_once_in_an_order_of_its_own():
    def epoch(number, seed):
        return np.concatenate([question_order(10, 4, 3 * number + place, seed) for place in range(3)]).tolist()

    orders = [epoch(0, 0), epoch(1, 0), epoch(0, 1)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert epoch(1, 0) == orders[1]


@pytest.mark.parametrize(("flags", "steps"), [({"epochs": 2}, 6), ({"max_steps": 7, "epochs": 2}, 7)])
def test_steps_come_from_epochs_or_are_given(flags, steps):
    assert total_steps(RunConfig(**flags), 10, 4) == steps


def test_the_embedder_alone_is_trained_and_measured_without_a_generator(world, tmp_path, capsys):
    """No generator is looked for: the one that is named does not exist."""
    config = world.config(tmp_path / "run", strategy="embedder", generator=str(tmp_path / "nowhere"), max_steps=2)
    summary = train(config)
    assert config.decode == "none"
    assert summary.before["em"] is summary.after["f1"] is None and summary.after["recall_at_5"] is not None
    assert "generator: not needed" in capsys.readouterr().out
    lines = read_lines(tmp_path / "run" / "predictions" / "test.after.jsonl")
    assert {line["prediction"] for line in lines} == {None}
    assert all({f"recall_at_{n}", f"hit_at_{n}"} <= line.keys() for line in lines for n in (1, 5, 10, 20))
    assert set(json.loads((tmp_path / "run" / "config.json").read_text())["inputs"]) == {"embedder", "data"}
    opened = open_run(tmp_path / "run", with_generator=False)
    assert opened.retrieve(["Where is Arby?"], 3).passage_rows.shape == (1, 3)
    with pytest.raises(UserError, match="was opened without its generator"):
        _ = opened.generator
    exported = export_run(tmp_path / "run", tmp_path / "out")
    assert [folder.name for folder in exported.iterdir()] == ["embedder"]
    # With answers, as it was before.
    answered = train(world.config(tmp_path / "answered", strategy="embedder", decode="concat", max_steps=2))
    assert answered.after["f1"] is not None
    for name in ("recall_at_5", "hit_at_5"):
        assert (answered.before[name], answered.after[name]) == (summary.before[name], summary.after[name])


def test_a_finished_run_is_evaluated_for_retrieval_alone(joint, monkeypatch):
    monkeypatch.setattr(run_module_of_runs, "load_untrained_generator", None)  # would be called
    found = evaluate_runs(EvaluateConfig(run_dir=joint.config.run_dir, decode="none", split="test"), {})
    (result,) = found.results
    after = read_lines(joint.folder / "predictions" / "test.after.jsonl")
    for name in ("recall_at_5", "hit_at_1", "mrr_at_10", "answer_in_context"):
        assert [line[name] for line in result.predictions] == [line[name] for line in after]
    assert result.scores["em"] is None
    with pytest.raises(UserError, match="--passage_answers asks for answers"):
        config = EvaluateConfig(run_dir=joint.config.run_dir, decode="none", passage_answers=True)
        evaluate_runs(config, {})
