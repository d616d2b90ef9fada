"""A yardstick from outside: ordinary LoRA fine-tuning in torch, on the same prompts.

    python experiments/benchmarks/torch_lora_yardstick.py --data=$RAGJAX_DATA/hotpotqa --out=torch_lora.hotpotqa.json

Each of the first training questions is read once, with its top-5 passages concatenated in one prompt, and the
generator is trained on the answer's plain NLL. Retrieval, prompts, question order, schedule, the prediction rule and
the metrics are ragjax's own (strategy generator, objective concat_nll, all defaults but the batch size), so what
differs is the trainer: transformers' model, torch's autograd and AdamW, and adapters written out below. Needs the
parity extra; about an hour on 2 cores.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ragjax import metrics
from ragjax.config import RunConfig
from ragjax.data.dataset import load_dataset
from ragjax.data.questions import Question
from ragjax.evaluation import METRICS, before_after_table, paired_interval, summarise
from ragjax.files import write_json
from ragjax.pipeline import Pipeline, build_pipeline, load_models
from ragjax.training.sampling import question_order
from ragjax.training.state import linear_schedule
from ragjax.training.strategies import phases_of

CONFIG = RunConfig(strategy="generator", objective="concat_nll", batch_size=2)
RATE = phases_of(CONFIG)[0].learning_rates(CONFIG)["generator"]
# What of CONFIG decides the result.
SETTINGS = ("top_k", "batch_size", "warmup_fraction", "weight_decay", "max_grad_norm", "seed")
SETTINGS += (
    "loss_reduction",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "max_passage_tokens",
    "max_new_tokens",
    "seed",
)
PACKAGES = ("torch", "transformers", "accelerate", "numpy")


class Adapted(torch.nn.Module):
    """y = linear(x) + (alpha / rank) * x A B (Hu et al. 2021, arXiv 2106.09685). A is random, B starts at zero."""

    def __init__(self, linear: torch.nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.linear = linear
        self.scale = alpha / rank
        like = {"device": linear.weight.device, "dtype": torch.float32}
        bound = linear.in_features**-0.5
        self.a = torch.nn.Parameter(torch.empty(linear.in_features, rank, **like).uniform_(-bound, bound))
        self.b = torch.nn.Parameter(torch.zeros(rank, linear.out_features, **like))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + (x @ self.a * self.scale) @ self.b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample", help="`sample`, or a folder with corpus, train and test")
    parser.add_argument("--questions", type=int, default=300, help="train on the first N questions")
    parser.add_argument("--eval_limit", type=int, default=100, help="evaluate the first N test questions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch's name of it")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    flags = parser.parse_args()
    torch.manual_seed(CONFIG.seed)
    dataset = load_dataset(flags.data)
    pipeline = build_pipeline(CONFIG, dataset, *load_models(CONFIG))
    model = load_torch_model(pipeline).to(flags.device)
    adapters = add_adapters(model)
    test = dataset.test[: flags.eval_limit]
    before = evaluate(model, pipeline, test, "before")
    training = train(model, adapters, pipeline, dataset.train[: flags.questions])
    after = evaluate(model, pipeline, test, "after")
    intervals = {name: paired_interval([r[name] for r in before], [r[name] for r in after]) for name in METRICS}
    print(before_after_table(summarise(before), summarise(after), intervals))
    result = {
        **provenance(*PACKAGES),
        "device": describe(flags.device),
        "data": {"name": dataset.name, "sha256": dataset.sha256},
        "generator": pipeline.generator.source.describe(),
        "settings": {"generator_lr": RATE} | {name: getattr(CONFIG, name) for name in SETTINGS},
        "n": len(test),
        "before": summarise(before),
        "after": summarise(after),
        "intervals_of_the_change": intervals,
        "training": training,
        "per_question": {"before": before, "after": after},
    }
    write_json(flags.out, result)


def load_torch_model(pipeline: Pipeline) -> LlamaForCausalLM:
    """The generator by transformers' own reading of its files, frozen, in float32."""
    source = pipeline.generator.source
    is_gguf = source.format == "gguf"
    folder, file = (source.path.parent, source.path.name) if is_gguf else (source.path, None)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.requires_grad_(False).eval()


def add_adapters(model: LlamaForCausalLM) -> list[torch.nn.Parameter]:
    """Puts an adapter beside every target projection; returns their parameters."""
    targets = CONFIG.lora_targets
    chosen = [
        (parent, name, child)
        for parent in model.model.layers.modules()
        for name, child in parent.named_children()
        if name in targets
    ]
    adapters = []
    for parent, name, linear in chosen:
        adapter = Adapted(linear, CONFIG.lora_rank, CONFIG.lora_alpha)
        setattr(parent, name, adapter)
        adapters += [adapter.a, adapter.b]
    return adapters


def concatenated_prompts(
    pipeline: Pipeline, questions: Sequence[Question], rows: np.ndarray, reserves: Sequence[int]
) -> list[list[int]]:
    """Prompt ids of each question under its passages, rows [questions, K]; `reserves`: tokens left for the answers."""
    return [
        pipeline.prompts.prompt(pipeline.passages(chosen[: CONFIG.top_k]), question.question, reserve).ids
        for question, chosen, reserve in zip(questions, rows, reserves, strict=True)
    ]


def train(
    model: LlamaForCausalLM,
    adapters: list[torch.nn.Parameter],
    pipeline: Pipeline,
    questions: Sequence[Question],
) -> dict[str, Any]:
    """One epoch with AdamW; the loss of each step, and what it cost."""
    answers = [pipeline.prompts.answer(question.answers[0]) for question in questions]
    rows = pipeline.retrieve([question.question for question in questions], CONFIG.top_k).passage_rows
    prompts = concatenated_prompts(pipeline, questions, rows, list(map(len, answers)))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # there is no dropout; transformers recomputes layers in this mode only
    steps = -(-len(questions) // CONFIG.batch_size)
    optimizer = torch.optim.AdamW(adapters, lr=RATE, weight_decay=CONFIG.weight_decay)
    factors = [float(linear_schedule(step, steps, CONFIG.warmup_fraction)) for step in range(steps)]
    losses, tokens, began = [], 0, time.perf_counter()
    with tqdm(range(steps), desc="training", unit="step", dynamic_ncols=True) as bar:
        for step in bar:
            chosen = question_order(len(questions), CONFIG.batch_size, step, CONFIG.seed)
            loss = answer_nll(model, [prompts[i] for i in chosen], [answers[i] for i in chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapters, CONFIG.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = RATE * factors[step]
            optimizer.step()
            losses.append(loss.item())
            tokens += sum(len(prompts[i]) + len(answers[i]) - 1 for i in chosen)
            bar.set_postfix(loss=f"{np.mean(losses[-10:]):.3f}")
    model.eval()
    return {"losses": losses, "seconds": time.perf_counter() - began, "tokens": tokens}


def answer_nll(model: LlamaForCausalLM, prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
    """NLL of the answers' tokens, summed over each answer and averaged over the questions.

    Rows are right-padded. The head is applied where answers are, which changes no value and saves memory; layers
    are computed again in the backward pass.
    """
    rows = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    tokens = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True).to(model.device)
    lengths = torch.tensor(list(map(len, rows)), device=model.device)
    mask = torch.arange(tokens.shape[1], device=model.device) < lengths[:, None]
    hidden = model.model(tokens, attention_mask=mask.long(), use_cache=False).last_hidden_state
    predicting = [state[len(prompt) - 1 : len(row)] for state, prompt, row in zip(hidden, prompts, rows, strict=True)]
    logits = model.lm_head(torch.cat(predicting))
    targets = torch.tensor([token for answer in answers for token in answer], device=model.device)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / len(rows)


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, pipeline: Pipeline, questions: Sequence[Question], name: str
) -> list[dict[str, Any]]:
    """Greedy answers, one question at a time, scored with the official metrics: ids and figures, no text."""
    width = min(max(CONFIG.top_k, 5), len(pipeline.store))
    found = pipeline.retrieve([question.question for question in questions], width).passage_rows
    prompts = concatenated_prompts(pipeline, questions, found, [CONFIG.max_new_tokens] * len(questions))
    end_ids = list(pipeline.generator.end_ids)
    records = []
    for question, prompt, rows in zip(tqdm(questions, desc=name), prompts, found, strict=True):
        inputs = torch.tensor([prompt], device=model.device)
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=CONFIG.max_new_tokens,
            do_sample=False,
            eos_token_id=end_ids,
            pad_token_id=end_ids[0],
        )
        prediction = pipeline.prediction(output[0, len(prompt) :].tolist())
        ids = pipeline.store.ids_of(rows)
        records.append(
            {
                "id": question.id,
                "em": metrics.exact_match(prediction, question.answers),
                "f1": metrics.f1(prediction, question.answers),
                "contains": metrics.contains_answer(prediction, question.answers),
                "recall_at_5": metrics.recall_at_k(ids, question.positive_ids, 5),
                "hit_at_5": metrics.hit_at_k(ids, question.positive_ids, 5),
            }
        )
    return records


def describe(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} torch threads"


if __name__ == "__main__":
    main()
