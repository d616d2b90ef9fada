"""What each strategy costs, as ratios to tuning the generator alone, and which way the embedder moves; all in one run.

    python experiments/benchmarks/strategy_cost.py --data=$RAGJAX_DATA/hotpotqa --out=strategy_cost.hotpotqa.json
    python experiments/benchmarks/strategy_cost.py --data=$RAGJAX_DATA/hotpotqa --out=ranking.hotpotqa.json \\
        --ranking_only --hard_negatives=5

MiniLM and SmolLM2-135M with adapters, all defaults (but for --hard_negatives), one epoch over the first training
questions. Steps of the generator's and of joint training alternate, so that a slow minute of the machine meets both;
costs are medians over steps times their number, so that compiling is left out, and evaluation stands apart. The phases
are those that ragjax.train and ragjax.lr_search run. About 80 minutes on 2 cores, 12 of them the ranking.
"""

import argparse
import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from provenance import provenance

from ragjax.config import PAPER_RATES, RunConfig
from ragjax.costs import Ledger
from ragjax.data.dataset import load_dataset
from ragjax.evaluation import mean_recall
from ragjax.files import write_json
from ragjax.rates.stacked import StackedResult, train_stacked
from ragjax.runs import Run, RunFolder, prepare
from ragjax.training.loop import Trainer
from ragjax.training.records import MetricsLog
from ragjax.training.signals import Assembler
from ragjax.training.step import make_eval_step
from ragjax.training.strategies import STRATEGIES, Phase

OBJECTIVES = ("rag_token", "rag_sequence")
RATES = list(PAPER_RATES)
GENERATOR, RETRIEVER = STRATEGIES["two_phase"]
(JOINT,), (RANKING,) = STRATEGIES["joint"], STRATEGIES["embedder"]
FORWARD_STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample")
    parser.add_argument("--embedder", default=RunConfig.embedder)
    parser.add_argument("--generator", default=RunConfig.generator)
    parser.add_argument("--questions", type=int, default=64, help="training questions")
    parser.add_argument("--dev", type=int, default=100, help="dev questions of the embedder's search")
    parser.add_argument("--hard_negatives", type=int, default=0, help="of ranking; the paper has none")
    parser.add_argument("--ranking_only", action="store_true", help="only ranking on all training questions")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after each part")
    flags = parser.parse_args()
    models = {"embedder": flags.embedder, "generator": flags.generator}
    base = RunConfig(
        data=flags.data,
        dev_every=0,
        keep="last",
        checkpoint_every=1_000_000,
        hard_negatives=flags.hard_negatives,
        negative_filter="labels",  # the paper has no filter, and the results were made without one
        **models,
    )
    whole = load_dataset(flags.data)
    dataset = dataclasses.replace(whole, train=whole.train[: flags.questions])
    start = prepare(base, dataset)
    result: dict[str, Any] = {
        **provenance(),
        "data": {"name": dataset.name, "sha256": dataset.sha256, "questions": flags.questions},
        "models": [start.embedder.describe(), start.generator.describe()],
    }
    watched = {"dev_every": 1, "dev_limit": flags.dev}
    with tempfile.TemporaryDirectory() as work:
        if not flags.ranking_only:
            measure_costs(start, watched, Path(work), result, flags.out)
            print_costs(result)
        result["ranking_on_all"] = ranking_direction(
            changed(dataclasses.replace(start, dataset=whole), Path(work) / "all", **watched)
        )
        write_json(flags.out, result)
        print_rates("ranking_on_all", result["ranking_on_all"])


def changed(run: Run, folder: Path, **flags: Any) -> Run:
    """The same models and data under other flags, in another folder."""
    return dataclasses.replace(run, config=dataclasses.replace(run.config, **flags), files=RunFolder(folder))


def measure_costs(start: Run, watched: dict[str, Any], work: Path, result: dict[str, Any], out: Path) -> None:
    """Fills `result` and writes it after each part."""
    for objective in OBJECTIVES:
        run = changed(start, work / objective, objective=objective)
        result[objective], trained = generator_and_joint(run)
        write_json(out, result)
        if objective == OBJECTIVES[0]:
            tuned = start.with_trained(jax.tree.map(jnp.asarray, trained))
    base_seconds = result[OBJECTIVES[0]]["generator_seconds"]
    result["two_phase"] = second_phase(changed(tuned, work / "two_phase", epochs=2), base_seconds)
    write_json(out, result)
    result["independent"] = ranking(changed(start, work / "independent"), base_seconds)
    write_json(out, result)
    for name, rungs in (("search", 1), ("search_halving", 3)):
        result[name] = embedder_search(changed(tuned, work / name, **watched), rungs, base_seconds)
        write_json(out, result)


@contextlib.contextmanager
def trainer(run: Run, phase: Phase) -> Iterator[Trainer]:
    with contextlib.closing(MetricsLog(run.files)) as log:
        made = Trainer(run, phase, log)
        log.start_phase(phase.name)
        yield made


def generator_and_joint(run: Run) -> tuple[dict[str, Any], Any]:
    """Both phases step by step in turn; (figures, what the generator's phase has trained)."""
    seconds: dict[str, list[float]] = {"generator": [], "joint": []}
    with (
        trainer(changed(run, run.folder / "generator"), GENERATOR) as one,
        trainer(changed(run, run.folder / "joint"), JOINT) as other,
    ):
        while one.step < one.steps:
            for name, each in (("generator", one), ("joint", other)):
                _, spent, _ = each.advance()
                seconds[name].append(spent)
            print(
                f"{run.config.objective} step {one.step}: {seconds['generator'][-1]:.1f} {seconds['joint'][-1]:.1f} s"
            )
        trained = jax.device_get(one.state.trainable)
        forward = forward_seconds(run, one)
    medians = {name: median(values) for name, values in seconds.items()}
    figures = {
        "generator_seconds": medians["generator"] * one.steps,
        "joint_ratio": medians["joint"] / medians["generator"],
        "joint_ratio_of_pairs": median(b / a for a, b in zip(*seconds.values(), strict=True)),
        "forward_share": forward / medians["generator"],
        "step_seconds": seconds,
        "tokens": {"generator": dataclasses.asdict(one.ledger.part("generator"))},
    }
    return figures, trained


def assembler_of(run: Run, phase: Phase) -> Assembler:
    return phase.signal.make_assembler(run, phase.trains)


def forward_seconds(run: Run, trained: Trainer) -> float:
    """Median of the same steps without a backward pass."""
    assembler = assembler_of(run, GENERATOR)
    step = run.arrangement.compile_sums(make_eval_step(assembler.objective))
    seconds = []
    for number in range(FORWARD_STEPS + 1):
        began = time.perf_counter()
        variables = {"embedder": run.embedder.variables, "generator": run.generator.variables}
        assembled = assembler.assemble(assembler.sampler.training_batch(number), variables, Ledger())
        jax.block_until_ready(step(trained.state.trainable, trained.frozen, assembled.batch))
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def second_phase(run: Run, base: float) -> dict[str, Any]:
    """Two epochs of the embedder over the kept likelihoods of the tuned generator."""
    with trainer(run, RETRIEVER) as made:
        seconds, tokens = [], []
        for _ in range(made.steps):
            line, spent, _ = made.advance()
            seconds.append(spent)
            tokens.append(line["generator_tokens"])
    half = made.steps // 2
    first, second = (median(part) * half for part in (seconds[:half], seconds[half:]))
    return {
        "two_phase_ratio": (base + first) / base,
        "second_epoch_adds": second / base,
        "second_epoch_adds_by_sum": sum(seconds[half:]) / base,
        "tokens_scored": [sum(tokens[:half]), sum(tokens[half:])],
        "step_seconds": seconds,
    }


def ranking(run: Run, base: float) -> dict[str, Any]:
    with trainer(run, RANKING) as made:
        seconds = [made.advance()[1] for _ in range(made.steps)]
    return {"independent_adds": median(seconds) * made.steps / base, "step_seconds": seconds}


def embedder_search(run: Run, rungs: int, base: float) -> dict[str, Any]:
    """Nine copies of the embedder on a cache that starts empty."""
    found = train_stacked(run, RATES, assembler_of(run, RETRIEVER), rungs)
    evaluation = found.cost.part("evaluation")
    return {
        "adds": median(found.step_seconds) * len(found.step_seconds) / base,
        "adds_by_sum": sum(found.step_seconds) / base,
        "pairs_scored_per_question": found.pairs / len(run.dataset.train),
        "dev_measurements": {
            "seconds": evaluation.seconds,
            "tokens": evaluation.tokens,
            "share": evaluation.seconds / base,
        },
        "step_seconds": found.step_seconds,
        **copies_table(found, run),
    }


def ranking_direction(run: Run) -> dict[str, Any]:
    """Multiple negatives ranking on every labelled training question."""
    assembler = assembler_of(run, RANKING)
    found = train_stacked(run, [*RATES, 3e-4], assembler)
    return {"training_questions": len(assembler.sampler.train), **copies_table(found, run)}


def copies_table(found: StackedResult, run: Run) -> dict[str, Any]:
    """Each rate's change of the dev loss with its standard error, and Recall@5 on the whole dev split."""
    rows = []
    for copy in found.copies:
        change = copy.dev_losses - found.start_losses
        params = None if copy.params is None else jax.tree.map(jnp.asarray, copy.params)
        rows.append(
            {
                "embedder_lr": copy.rate,
                "steps": copy.steps,
                "dev_loss": float(copy.dev_losses.mean()),
                "change": float(change.mean()),
                "standard_error": float(change.std(ddof=1) / math.sqrt(len(change))),
                "recall_at_5": None if params is None else recall(run, params),
            }
        )
    best = min((row for row in rows if row["recall_at_5"] is not None), key=lambda row: row["dev_loss"])
    return {
        "dev_loss_before": float(found.start_losses.mean()),
        "recall_at_5_before": recall(run, run.embedder.params),
        "winner": best["embedder_lr"],
        "rates": rows,
    }


def recall(run: Run, params: Any) -> float | None:
    trained, dev = run.with_trained({"embedder": {"params": params}}), run.dataset.dev
    rows = trained.retrieve([question.question for question in dev], 5).passage_rows
    return mean_recall(run.pipeline.store, dev, rows)


def print_costs(result: dict[str, Any]) -> None:
    for objective in OBJECTIVES:
        print(f"joint, {objective}: {result[objective]['joint_ratio']:.3f} of the generator's")
    print(f"forward share: {result[OBJECTIVES[0]]['forward_share']:.3f}")
    two_phase, independent = result["two_phase"], result["independent"]
    print(f"two_phase: {two_phase['two_phase_ratio']:.3f}, second epoch +{two_phase['second_epoch_adds']:.3f}")
    print(f"independent: +{independent['independent_adds']:.3f}")
    for name in ("search", "search_halving"):
        found = result[name]
        print(
            f"{name}: +{found['adds_by_sum']:.3f}, {found['pairs_scored_per_question']:.2f} pairs a question, winner "
            f"{found['winner']:g}"
        )
    print_rates("search", result["search"])


def print_rates(name: str, found: dict[str, Any]) -> None:
    print(f"{name}: Recall@5 {found['recall_at_5_before']:.3f} before")
    for row in found["rates"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
