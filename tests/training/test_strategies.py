"""Every strategy as a whole run: what each phase trains, on which passages, and what it is charged for."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from ragjax.checkpoints import Checkpoints
from ragjax.config import DecodeConfig, RetrievalConfig, RunConfig, SearchConfig
from ragjax.costs import Cost
from ragjax.data.dataset import load_dataset
from ragjax.data.questions import Question
from ragjax.errors import UserError
from ragjax.evaluation import strategy_table
from ragjax.pipeline import Pipeline
from ragjax.runs import Summary, open_run, prepare
from ragjax.training import run as run_module
from ragjax.training import train
from ragjax.training.loop import train_phase
from ragjax.training.signals import LikelihoodAssembler, RankingAssembler
from ragjax.training.strategies import STRATEGIES, choose_strategy, unread_flags
from tests.tiny_runs import changed, flat, passages, questions, read_lines, refusal, tiny_world, write_data

pytestmark = pytest.mark.slow

STEPS, BATCH = 5, 4  # of 12 questions: the second epoch begins behind the third step
UNLABELLED = ("train-1", "train-7")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny world, with two training questions without labels."""
    with tiny_world(tmp_path_factory) as world:
        splits = questions()
        for question in splits["train"]:
            if question["id"] in UNLABELLED:
                question["positive_ids"] = []
        yield dataclasses.replace(world, data=write_data(world.folder / "some-labels", passages(), splits))


def config_of(world, name: str, **changes: Any) -> RunConfig:
    """The same flags for every strategy; at this rate of the embedder its loss falls and what it finds changes."""
    values = {"max_steps": STEPS, "batch_size": BATCH, "ranking_batch_size": BATCH, "embedder_lr": 3e-4}
    return world.config(world.folder / "strategies" / name, **values | {"eval_limit": 2} | changes)


# What others than phases read.
GENERAL = {
    *(field.name for config in (DecodeConfig, RetrievalConfig) for field in dataclasses.fields(config)),
    *("strategy", "embedder", "query_prefix", "passage_prefix", "generator", "data", "run_dir", "top_k", "score_scale"),
    *("embedder_run", "generator_run", "lora_rank", "lora_alpha", "lora_targets", "prompt", "max_passage_tokens"),
    *("seed", "eval_split", "eval_limit", "eval_batch_size", "dtype", "quantize", "scan_layers", "remat"),
    *("parallelism", "mesh", "refresh_passages"),
}  # fmt: skip


def test_every_flag_belongs_to_phases_or_to_all_else():
    of_phases = {flag for phases in STRATEGIES.values() for phase in phases for flag in phase.flags}
    names = {field.name for config in (RunConfig, SearchConfig) for field in dataclasses.fields(config)}
    assert of_phases | GENERAL | {"select", "halving", "grid"} == names
    assert not of_phases & GENERAL


@pytest.mark.parametrize(
    ("strategy", "flags", "unread"),
    [
        ("embedder", {"generator_lr": 1e-3, "objective": "rag_sequence", "batch_size": 9}, True),
        ("embedder", {"embedder_lr": 1e-3, "hard_negatives": 0, "ranking_batch_size": 2, "epochs": 3}, False),
        ("generator", {"ranking_batch_size": 2, "negative_margin": 0.2, "embedder_lr": 1e-3}, True),
        ("generator", {"generator_lr": 1e-3, "batch_size": 9, "lora_dropout": 0.1, "objective": "concat_nll"}, False),
        # The default, and what all read.
        ("generator", {"ranking_batch_size": 8, "generator": "other", "top_k": 2}, False),
        ("independent", {"ranking_batch_size": 2, "embedder_lr": 1e-3, "generator_lr": 1e-3, "dev_limit": 3}, False),
        ("two_phase", {"retriever_objective": "emdr2", "retriever_temperature": 2.0, "lora_dropout": 0.1}, False),
        ("two_phase", {"hard_negatives": 0}, True),
        ("two_phase", {"backward_passages": 2}, False),
        ("embedder", {"backward_passages": 2}, True),
        ("none", {"epochs": 2, "keep": "last", "batch_size": 2}, True),
    ],
)
def test_flags_that_no_phase_reads(strategy, flags, unread):
    found = unread_flags(RunConfig(strategy=strategy, **flags), STRATEGIES[strategy])
    assert set(found) == {f"--{name}" for name in (flags if unread else ())}


def test_flags_that_are_given_in_vain_are_warned_of(world, tmp_path, capsys):
    flags = {"strategy": "embedder", "max_steps": 1, "decode": "none", "batch_size": 4, "dev_limit": 24}
    train(world.config(tmp_path / "run", **flags))
    assert capsys.readouterr().err.startswith(
        "warning: --generator_lr changes nothing here: no phase that is trained with --strategy=embedder reads that.\n"
    )
    again = {"generator_lr": None, "run_dir": str(tmp_path / "other")}
    train(world.config(**flags | again))
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(("strategy", "head"), [("embedder", "embedder"), ("generator", "generator (rag_token)")])
def test_the_head_names_an_objective_where_one_is_used(world, tmp_path, capsys, strategy, head):
    config = world.config(tmp_path / "run", strategy=strategy, max_steps=1, eval_limit=1)
    assert train(config).objective == ("rag_token" if "(" in head else None)
    assert f"\n{head}, 1 test questions\n" in capsys.readouterr().out


@dataclasses.dataclass
class Finished:
    """A run that has ended."""

    config: RunConfig
    folder: Path
    summary: Summary | None
    pipelines: list[Pipeline]  # that were evaluated: before, after

    def lines(self, phase: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.folder / "metrics.jsonl") if line["phase"] == phase]

    def trained(self, phase: str) -> dict[str, Any]:
        """What the phase's last checkpoint holds, {model: {collection: tree}}."""
        step, trees, _ = Checkpoints(self.folder / "checkpoints" / phase).restore({"trainable": None})
        assert step == self.config.max_steps
        return trees["trainable"]

    def predictions(self, moment: str) -> bytes:
        return (self.folder / "predictions" / f"test.{moment}.jsonl").read_bytes()


def finish(config: RunConfig) -> Finished:
    finished = Finished(config, Path(config.run_dir), None, [])
    evaluate = run_module.evaluate

    def watched_evaluate(pipeline, *arguments, **options):
        finished.pipelines.append(pipeline)
        return evaluate(pipeline, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "evaluate", watched_evaluate)
        finished.summary = train(config)
    return finished


def same(one: Any, other: Any) -> bool:
    return changed(one, other) == set()


def without_seconds(cost: Any) -> Any:
    return {
        name: without_seconds(value) if isinstance(value, dict) else value
        for name, value in cost.items()
        if name != "seconds"
    }


@dataclasses.dataclass
class Seen:
    """The questions of each batch that an assembler made, training apart from dev."""

    training: list[list[str]]
    dev: list[list[str]]


@pytest.fixture(scope="module")
def embedder_and_asked(world) -> tuple[Finished, Seen]:
    seen, assemble = Seen([], []), RankingAssembler.assemble

    def watched(self, asked, variables, ledger):
        (seen.training if asked.training else seen.dev).append([question.id for question in asked.questions])
        return assemble(self, asked, variables, ledger)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankingAssembler, "assemble", watched)
        return finish(config_of(world, "embedder", strategy="embedder")), seen


@pytest.fixture(scope="module")
def embedder(embedder_and_asked) -> Finished:
    return embedder_and_asked[0]


@pytest.fixture(scope="module")
def generator(world) -> Finished:
    return finish(config_of(world, "generator", strategy="generator"))


@pytest.fixture(scope="module")
def independent(world) -> Finished:
    return finish(config_of(world, "independent", strategy="independent"))


@dataclasses.dataclass
class Scored:
    """A batch that the phase over a frozen generator has made."""

    pairs: set[tuple[str, int]]  # (question, passage row)
    tokens: int  # that the generator read for it
    lengths: dict[tuple[str, int], int]  # of each pair: the tokens of its prompt and answer that a model reads
    training: bool


@pytest.fixture(scope="module")
def two_phase_and_scored(world) -> tuple[Finished, list[Scored]]:
    scored, assemble = [], LikelihoodAssembler.assemble

    def watched(self, asked, variables, ledger):
        made = assemble(self, asked, variables, ledger)
        prompts, store, lengths = self._pipeline.prompts, self._pipeline.store, {}
        for question, rows in zip(asked.questions, made.passage_rows, strict=True):
            answer = prompts.answer(question.answers[0])
            for row in rows.tolist():
                prompt = prompts.prompt([store[row]], question.question, reserve=len(answer)).ids
                lengths[question.id, row] = len(prompt) + len(answer) - 1
        scored.append(Scored(set(lengths), made.figures["generator_tokens"], lengths, asked.training))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LikelihoodAssembler, "assemble", watched)
        return finish(config_of(world, "two-phase", strategy="two_phase")), scored


@pytest.fixture(scope="module")
def two_phase(two_phase_and_scored) -> Finished:
    return two_phase_and_scored[0]


# ---- the embedder, from labels -----------------------------------------------------------------------------


def test_the_embedder_alone_moves(embedder):
    before, after = embedder.pipelines
    moved = changed(before.embedder.params, after.embedder.params)
    assert {name for name in flat(before.embedder.params) if "key/bias" not in name} <= moved
    assert before.reader is None and after.reader is None
    trained = embedder.trained("embedder")
    assert {model: set(collections) for model, collections in trained.items()} == {"embedder": {"params"}}
    assert same(trained["embedder"]["params"], after.embedder.params)
    lines = embedder.lines("embedder")
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert all(math.isfinite(line["loss"]) for line in lines[1:])
    assert [line["step"] for line in lines if "dev_loss" in line] == [0, 2, 4, 5]
    assert lines[-1]["dev_loss"] < lines[0]["dev_loss"]
    for name in ("dev_distinct_passages_per_100", "dev_top_k_agreement", "dev_recall_at_5"):
        assert name in lines[-1]


def test_questions_without_labels_are_skipped_and_counted(embedder_and_asked, capsys):
    finished, asked = embedder_and_asked
    labelled = {question["id"] for question in questions()["train"]} - {*UNLABELLED}
    assert [len(batch) for batch in asked.training] == [4, 4, 2, 4, 4]  # ten questions an epoch
    assert {question for batch in asked.training[:3] for question in batch} == labelled
    assert {question for batch in asked.training[3:] for question in batch} <= labelled
    assert [line["questions"] for line in finished.lines("embedder")[1:]] == [4, 4, 2, 4, 4]
    assert finished.summary.skipped_questions == len(UNLABELLED)
    train(finished.config)  # a finished run prints its summary
    assert "2 questions without positive_ids" in capsys.readouterr().out


def test_the_embedder_costs_no_generator(embedder):
    cost = embedder.summary.cost["phases"]["embedder"]
    assert cost["generator"]["tokens"] == cost["search"]["flops"] == 0
    # Each question is read once a step, forward and backward.
    assert cost["embedder"]["backward_tokens"] == cost["embedder"]["tokens"] > 0


def test_without_any_label_there_is_nothing_to_rank(world, tmp_path):
    splits = questions()
    splits["train"] = [question | {"positive_ids": []} for question in splits["train"]]
    data = write_data(tmp_path / "data", passages(), splits)
    with pytest.raises(UserError, match="no training question of data has positive_ids") as caught:
        train(config_of(world, tmp_path / "run", strategy="embedder", data=str(data), eval_limit=1))
    assert "\n" not in str(caught.value)


# ---- both, each by itself ----------------------------------------------------------------------------------


def test_independent_is_both_runs_side_by_side(embedder, generator, independent):
    """Bit for bit, so the generator was trained on what the untrained embedder finds."""
    assert same(independent.trained("embedder"), embedder.trained("embedder"))
    assert same(independent.trained("generator"), generator.trained("generator"))
    for name, alone in (("embedder", embedder), ("generator", generator)):
        assert independent.lines(name) == alone.lines(name)
    before, after = independent.pipelines
    assert same(after.embedder.variables, embedder.pipelines[1].embedder.variables)
    assert same(after.generator.variables, generator.pipelines[1].generator.variables)
    assert not same(after.embedder.params, before.embedder.params)
    assert not same(after.generator.lora, before.generator.lora)
    for part in ("embedder", "generator", "search"):
        one, other = (run.summary.cost["phases"] for run in (embedder, generator))
        tokens = independent.summary.cost[part]["tokens"]
        assert tokens == one["embedder"][part]["tokens"] + other["generator"][part]["tokens"]


def test_a_run_of_two_phases_is_opened_with_both(independent, two_phase):
    for finished in (independent, two_phase):
        opened = open_run(finished.folder)
        after = finished.pipelines[1]
        assert opened.step == STEPS
        assert same(opened.pipeline.embedder.variables, after.embedder.variables)
        assert same(opened.pipeline.generator.variables, after.generator.variables)


def test_finished_runs_are_taken_over(world, embedder, generator, independent, monkeypatch):
    """Nothing is trained; models, predictions and costs are those of the run that trained both."""
    monkeypatch.setattr(run_module, "train_phase", None)
    config = config_of(
        world,
        "taken-over",
        strategy="independent",
        embedder_run=str(embedder.folder),
        generator_run=str(generator.folder),
    )
    taken = finish(config)
    assert not (taken.folder / "metrics.jsonl").exists()
    for name in ("embedder", "generator"):
        assert same(taken.trained(name), independent.trained(name))
    for moment in ("before", "after"):
        assert taken.predictions(moment) == independent.predictions(moment)
        assert getattr(taken.summary, moment) == getattr(independent.summary, moment)
    cost = taken.summary.cost
    assert without_seconds(cost) == without_seconds(independent.summary.cost)
    for name, alone in (("embedder", embedder), ("generator", generator)):
        assert cost["phases"][name] == alone.summary.cost["phases"][name]
    # The same command on the finished folder, and on one that was killed before its end.
    (taken.folder / "summary.json").unlink()
    assert train(config).cost["phases"] == cost["phases"]


@pytest.mark.parametrize("flag", ["embedder_run", "generator_run"])
@pytest.mark.parametrize("strategy", ["joint", "embedder", "generator", "none"])
def test_taking_over_needs_a_strategy_that_combines(world, tmp_path, strategy, flag):
    message = refusal(config_of(world, tmp_path / "run", strategy=strategy, **{flag: "runs/other"}))
    assert f"--{flag} takes over a model that --strategy={strategy} does not combine" in message
    assert "--strategy=independent" in message
    assert ("two_phase" in message) == (flag == "generator_run")
    assert not (tmp_path / "run").exists()


def test_only_a_finished_run_of_the_same_kind_is_taken_over(world, tmp_path, embedder, generator, monkeypatch):
    monkeypatch.setattr(run_module, "evaluate", lambda *_, **__: ([], Cost()))

    def refused(strategy="independent", **flags):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return refusal(config_of(world, folder, strategy=strategy, **flags))

    finished = {"embedder_run": str(embedder.folder), "generator_run": str(generator.folder)}
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for path in generator.folder.iterdir():
        if path.name != "summary.json":
            (unfinished / path.name).symlink_to(path)
    message = refused(**finished | {"generator_run": str(unfinished)})
    assert f"--generator_run={unfinished} is not a finished run that trained the generator alone" in message
    # A finished run, but of the other model.
    message = refused(**finished | {"embedder_run": str(generator.folder)})
    assert f"--embedder_run={generator.folder} is not a finished run that trained the embedder alone" in message
    message = refused(**finished, lora_rank=5)
    assert f"--generator_run={generator.folder} was trained with --lora_rank=4 (now 5)" in message
    message = refused(**finished, query_prefix="query: ")
    assert f"--embedder_run={embedder.folder} was trained with --query_prefix=None (now query: )" in message
    assert "two_phase" not in message
    message = refused(**finished, refresh_passages=3)
    assert f"--embedder_run={embedder.folder} was trained with --refresh_passages=0 (now 3)" in message
    assert "--lora_rank=5" not in refused("two_phase", generator_run=str(tmp_path / "nowhere"))
    message = refused("two_phase", generator_run=str(tmp_path / "nowhere"))
    assert "nowhere holds no config.json" in message


# ---- the generator, then the embedder by its likelihoods ---------------------------------------------------


def test_the_first_of_two_phases_is_a_generator_run(generator, two_phase):
    assert same(two_phase.trained("generator"), generator.trained("generator"))
    assert two_phase.lines("generator") == generator.lines("generator")
    assert two_phase.summary.skipped_questions == generator.summary.skipped_questions == 0
    one, other = (run.summary.cost["phases"]["generator"] for run in (two_phase, generator))
    assert without_seconds(one) == without_seconds(other)


def test_the_second_phase_moves_the_embedder_alone(two_phase):
    before, after = two_phase.pipelines
    assert same(after.generator.lora, two_phase.trained("generator")["generator"]["lora"])
    assert same(after.generator.params, before.generator.params)
    moved = changed(before.embedder.params, after.embedder.params)
    assert {name for name in flat(before.embedder.params) if "key/bias" not in name} <= moved
    trained = two_phase.trained("retriever")
    assert {model: set(collections) for model, collections in trained.items()} == {"embedder": {"params"}}
    assert same(trained["embedder"]["params"], after.embedder.params)


def test_the_second_phase_begins_where_the_first_has_ended(two_phase):
    first, second = two_phase.lines("generator"), two_phase.lines("retriever")
    assert [line["step"] for line in second] == list(range(STEPS + 1))
    for name in ("nll_per_answer", "nll_per_token", "loss", "retrieval_entropy", "posterior_entropy"):
        assert second[0][f"dev_{name}"] == pytest.approx(first[-1][f"dev_{name}"], rel=1e-5), name
    assert second[-1]["dev_nll_per_answer"] != second[0]["dev_nll_per_answer"]
    assert all(math.isfinite(line["loss"]) for line in second[1:])
    assert not any("dev_top_k_agreement" in line for line in first)
    assert second[0]["dev_top_k_agreement"] == 1 > second[-1]["dev_top_k_agreement"]


def test_a_frozen_generator_is_charged_forward_only(two_phase):
    phases = two_phase.summary.cost["phases"]
    generator, embedder = phases["generator"]["generator"], phases["generator"]["embedder"]
    assert generator["tokens"] == generator["backward_tokens"] > 0
    assert generator["tokens"] == sum(line["generator_tokens"] for line in two_phase.lines("generator")[1:])
    assert embedder["tokens"] > embedder["backward_tokens"] == 0
    generator, embedder = phases["retriever"]["generator"], phases["retriever"]["embedder"]
    assert generator["tokens"] == sum(line["generator_tokens"] for line in two_phase.lines("retriever")[1:]) > 0
    assert generator["backward_tokens"] == 0
    # The question is read once to retrieve and once in the step, which goes backward.
    assert embedder["tokens"] == 2 * embedder["backward_tokens"] > 0
    flops_a_token = [phases[name]["generator"]["flops"] / phases[name]["generator"]["tokens"] for name in phases]
    assert 1.5 < flops_a_token[0] / flops_a_token[1] < 3
    assert two_phase.summary.cost["generator"]["tokens"] == sum(phases[p]["generator"]["tokens"] for p in phases)


def test_a_pair_is_scored_once(two_phase_and_scored):
    finished, scored = two_phase_and_scored
    seen: set[tuple[str, int]] = set()
    for batch in scored:
        assert batch.tokens == sum(batch.lengths[pair] for pair in batch.pairs - seen)
        seen |= batch.pairs
    training = [batch for batch in scored if batch.training]
    assert [len(batch.pairs) for batch in training] == [BATCH * 3] * STEPS
    first, second = (sum(batch.tokens for batch in part) / len(part) for part in (training[:3], training[3:]))
    assert 0 < second < first  # the moved embedder also finds passages that it had not found before
    assert [batch.tokens for batch in training] == [
        line["generator_tokens"] for line in finished.lines("retriever")[1:]
    ]


@pytest.mark.parametrize(
    ("objective", "strategy"),
    [("emdr2", "joint"), ("emdr2", "two_phase")],
)
def test_the_retriever_can_have_a_loss_of_its_own(world, tmp_path, objective, strategy):
    """One step of the phase that trains the embedder, from the untrained models."""
    config = config_of(world, tmp_path, strategy=strategy, retriever_objective=objective, max_steps=1, dev_limit=2)
    run = prepare(config)
    trained = train_phase(run, STRATEGIES[strategy][-1]).trained
    assert not same(trained["embedder"]["params"], run.embedder.params)
    start, step = read_lines(tmp_path / "metrics.jsonl")
    for name in ("loss", "nll_per_answer", "retriever_loss", "embedder_grad_norm"):
        assert math.isfinite(step[name]), name
        assert step[name] > 0, name
    assert step["loss"] == pytest.approx(step["nll_per_answer"] + step["retriever_loss"], rel=1e-5)
    assert math.isfinite(start["dev_retriever_loss"])


def test_the_retrievers_loss_is_no_part_of_the_generators(world, tmp_path):
    """The first of two phases is the same whatever the second one minimises."""
    config = config_of(world, tmp_path, strategy="two_phase", retriever_objective="pdist", max_steps=1)
    train_phase(prepare(config), STRATEGIES["two_phase"][0])
    start, step = read_lines(tmp_path / "metrics.jsonl")
    assert "retriever_loss" not in step
    assert step["loss"] == pytest.approx(step["nll_per_answer"], rel=1e-6)
    assert start["dev_loss"] == pytest.approx(start["dev_nll_per_answer"], rel=1e-6)


# ---- what the data decide ----------------------------------------------------------------------------------


def asked_questions(labelled: int, count: int = 4) -> list[Question]:
    return [Question(f"q{i}", "why?", ["so"], ["p0"] if i < labelled else []) for i in range(count)]


RULES = [
    (2, {}, "independent", "2 of 4 training questions have labelled passages: each model can be tuned alone"),
    (2, {"embedder_lr": 1e-5, "generator_lr": 1e-4}, "independent", "2 of 4"),
    (1, {"embedder_lr": 1e-5, "generator_lr": 1e-4}, "joint", "1 of 4 training questions have labelled passages, and"),
    (1, {}, "two_phase", "the learning rates are open"),
    (0, {"generator_lr": 1e-4}, "two_phase", "the learning rates are open"),
]


@pytest.mark.parametrize(("labelled", "rates", "picked", "words"), RULES)
def test_auto_follows_the_labels_and_then_the_rates(labelled, rates, picked, words):
    strategy, reason = choose_strategy(RunConfig(strategy="auto", **rates), asked_questions(labelled))
    assert strategy == picked
    assert words in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("labelled", "rates", "picked"),
    [
        (6, {"embedder_lr": None, "generator_lr": None}, "independent"),
        (5, {"embedder_lr": 1e-3, "generator_lr": 1e-2}, "joint"),
        (5, {"embedder_lr": None}, "two_phase"),
    ],
)
def test_auto_says_what_it_picks_and_why(world, tmp_path, monkeypatch, capsys, labelled, rates, picked):
    """Half of the 12 training questions is the border. The run is stopped where its phases are asked for."""
    splits = questions()
    for question in splits["train"][labelled:]:
        question["positive_ids"] = []
    data = write_data(tmp_path / "data", passages(), splits)
    config = config_of(world, tmp_path / "run", strategy="auto", data=str(data), **rates)

    def stop(config):
        raise UserError(f"stopped at {config.strategy}")

    monkeypatch.setattr(run_module, "phases_of", stop)
    assert refusal(config) == f"stopped at {picked}"
    _, reason = choose_strategy(config, load_dataset(str(data)).train)
    assert f"{labelled} of 12 training questions" in reason
    assert capsys.readouterr().out == f"--strategy=auto picks {picked}: {reason}.\n"


def test_an_automatic_run_is_one_of_the_picked_strategy(world, independent, capsys):
    config = config_of(world, "auto", strategy="auto")
    automatic = finish(config)
    assert "--strategy=auto picks independent: 10 of 12 training questions" in capsys.readouterr().out
    assert automatic.summary.strategy == "independent"
    for name in ("embedder", "generator"):
        assert same(automatic.trained(name), independent.trained(name))
    assert automatic.predictions("after") == independent.predictions("after")
    # It is the same run when the command is given again.
    assert train(config).strategy == "independent"
    assert "--strategy=auto picks independent" in capsys.readouterr().out


# ---- what the strategies cost ------------------------------------------------------------------------------

MEASURED = {
    "embedder": {"embedder"},
    "generator": {"generator"},
    "independent": {"embedder", "generator", "independent"},
    "two_phase": {"generator", "two_phase"},
}


@pytest.mark.parametrize("strategy", MEASURED)
def test_every_strategy_has_a_cost_beside_the_others(request, strategy, capsys):
    finished = request.getfixturevalue(strategy)
    costs = {cost["strategy"]: cost for cost in finished.summary.strategy_costs}
    assert list(costs) == [name for name in STRATEGIES if name != "none"]
    assert {name for name, cost in costs.items() if cost["is_measured"]} == MEASURED[strategy]
    # Questions of an epoch, and those that were trained on in five steps.
    counts = {"embedder": (10, 18), "generator": (12, 20), "retriever": (12, 20)}
    phases = finished.summary.cost["phases"]
    epoch = {name: cost["seconds"] * counts[name][0] / counts[name][1] for name, cost in phases.items()}
    if "retriever" in phases:  # its generator has scored the pairs in the first epoch
        scoring = phases["retriever"]["generator"]["seconds"]
        epoch["retriever"] = (phases["retriever"]["seconds"] - scoring) * 12 / 20 + scoring
    for name in MEASURED[strategy]:
        seconds = sum(epoch[phase.name] for phase in STRATEGIES[name])
        assert costs[name]["seconds"] == pytest.approx(seconds, rel=1e-9), name
    if strategy == "embedder":  # tells nothing of a generator
        assert costs["joint"]["seconds"] is costs["two_phase"]["seconds"] is costs["independent"]["seconds"] is None
    else:
        assert all(cost["seconds"] > 0 for cost in costs.values())
    train(finished.config)  # a finished run prints its summary
    printed = capsys.readouterr().out
    assert strategy_table(finished.summary.strategy_costs) in printed
    assert "One epoch of each strategy" in printed
