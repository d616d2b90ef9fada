"""What 8 and 4 bits cost: storage, loss and direction of the adapters' gradient against the unquantised base.

    python experiments/benchmarks/quantization.py --data=$RAGJAX_DATA/hotpotqa --out=quantization.hotpotqa.json

Dev questions under their nearest passage, fresh adapters (so the gradient is that of the first training step).
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from provenance import provenance

from ragjax.config import QUANTIZE, RunConfig
from ragjax.data.batches import Rows, Shape, make_rows, round_up
from ragjax.data.dataset import load_dataset
from ragjax.files import write_json
from ragjax.pipeline import build_pipeline, load_models
from ragjax.pretrained import Generator
from ragjax.scoring import score_answers

AT_ONCE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample")
    parser.add_argument("--generator", default=RunConfig.generator)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    config = RunConfig(data=flags.data, generator=flags.generator)
    pipeline, batches = read(config, flags.questions)
    base = measure(pipeline.generator, batches)
    table = [row("none", base, base)]
    for kind in QUANTIZE:
        generator = load_models(dataclasses.replace(config, quantize=kind))[1]
        table.append(row(kind, measure(generator, batches), base))
    for line in table:
        print("  ".join(f"{name} {value}" for name, value in line.items()))
    result = {
        **provenance(),
        "generator": pipeline.generator.describe(),
        "questions": flags.questions,
        "kinds": table,
    }
    write_json(flags.out, result)


def read(config: RunConfig, count: int):
    """The unquantised pipeline, and the questions as rows of `AT_ONCE` prompts."""
    dataset = load_dataset(config.data)
    pipeline = build_pipeline(config, dataset, *load_models(config))
    questions = dataset.dev[:count]
    retrieved = pipeline.retrieve([question.question for question in questions], 1)
    answers = [pipeline.prompts.answer(question.answers[0]) for question in questions]
    prompts = [
        pipeline.prompts.prompt(pipeline.passages(rows), question.question, reserve=len(answer)).ids
        for question, answer, rows in zip(questions, answers, retrieved.passage_rows, strict=True)
    ]
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    shape = Shape(AT_ONCE, round_up(longest, 64), round_up(max(map(len, answers)), 8))
    batches = []
    for start in range(0, len(questions), AT_ONCE):
        chosen = range(start, min(start + AT_ONCE, len(questions)))
        batches.append(make_rows([[prompts[i]] for i in chosen], [answers[i] for i in chosen], chosen, shape, AT_ONCE))
    return pipeline, batches


def measure(generator: Generator, batches: list[Rows]) -> dict[str, object]:
    """Mean NLL per answer, the adapters' summed gradient, and bytes of the layers' kernels."""

    @jax.jit
    def nll(lora, params, rows):
        scores = score_answers(generator.module, {"params": params, "lora": lora}, rows)[:, 0]
        return -jnp.sum(jnp.where(rows.answer_mask, scores, 0.0))

    grad = jax.jit(jax.value_and_grad(nll))
    total, gradient = 0.0, 0.0
    for rows in batches:
        value, tree = grad(generator.lora, generator.params, rows)
        total, gradient = total + float(value), gradient + np.asarray(ravel_pytree(tree)[0], np.float64)
    questions = sum(int(rows.answer_mask.any(-1).sum()) for rows in batches)
    leaves = jax.tree_util.tree_leaves_with_path(generator.params["layers"])
    kernels = sum(leaf.nbytes for path, leaf in leaves if "kernel" in jax.tree_util.keystr(path))
    return {"nll": total / questions, "gradient": gradient, "kernel_bytes": kernels}


def row(kind: str, measured: dict[str, object], base: dict[str, object]) -> dict[str, object]:
    one, other = measured["gradient"], base["gradient"]
    return {
        "kind": kind,
        "kernel_bytes": measured["kernel_bytes"],
        "share_of_float32": round(measured["kernel_bytes"] / base["kernel_bytes"], 4),
        "nll_per_answer": round(measured["nll"], 4),
        "gradient_cosine": round(float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other))), 4),
    }


if __name__ == "__main__":
    main()
