"""The joint RAG-Token step beside torch, transformers and peft: the same rows and losses, speed and peak memory.

    .venv-parity/bin/python experiments/benchmarks/joint_peer.py --data=$RAGJAX_DATA/hotpotqa \\
        --out=experiments/results/joint_peer.hotpotqa.json

Each side is a process of its own that trains the same steps from the same weights and adapters, `--turns` times, the
sides in turn:

    ragjax   the training loop of ragjax.train, retrieval and tokenisation included
    drawn    the same with --backward_passages=2
    tuned    torch: right-padded rows without a mask (nothing real sees the padding), the head at answer positions only
    usual    torch: padded rows with a mask, logits everywhere; its memory is limited to --limit_gb

The losses of the steps have to agree to 1e-3. Speed is the median of the later half of the steps, in real tokens, so
that a step which compiles does not count; peaks are those of the processes. Needs the parity extra. About half an hour
on 2 cores.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

SIDES = ("ragjax", "drawn", "tuned", "usual")
AGREEMENT = 1e-3
SAME_ROWS = 0.02  # share of the tokens that may lie in other passages
SETTINGS = ("score_scale", "lora_rank", "lora_alpha", "lora_targets", "weight_decay", "max_grad_norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--sides", default=",".join(SIDES), help="separated by commas; ragjax and tuned among them")
    parser.add_argument("--limit_gb", type=float, default=22.0, help="address space of the usual side")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after each process")
    parser.add_argument("--side", choices=("rows", *SIDES), help="do this one here, and print it")
    parser.add_argument("--rows", type=Path, help="folder of what torch needs to know")
    flags = parser.parse_args()
    if flags.side is None:
        compare(flags)
    elif flags.side == "rows":
        write_rows(flags)
    else:
        run = train_torch if flags.side in ("tuned", "usual") else train_ragjax
        print(json.dumps(run(flags)))


def compare(flags: argparse.Namespace) -> None:
    """Runs the sides in turn, writes what they say, and prints the ratios."""
    from provenance import provenance

    result: dict[str, Any] = {**provenance("torch", "transformers", "peft"), "batch_size": flags.batch_size}
    names = flags.sides.split(",")
    result["sides"] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        child("rows", folder)
        for name in names * flags.turns:
            result["sides"][name].append(child(name, folder) or {"failed": f"within {flags.limit_gb:g} GB"})
            write(flags.out, result)
    check_losses(result["sides"])
    result["figures"] = {name: figures(turns) for name, turns in result["sides"].items()}
    base = result["figures"]["tuned"]
    result["tuned_is_1"] = {name: {key: own[key] / base[key] for key in own} for name, own in result["figures"].items()}
    write(flags.out, result)
    print(json.dumps(result["tuned_is_1"], indent=2))


def child(side: str, folder: str) -> dict[str, Any] | None:
    """What a process for one side prints; None where the usual one ran out of memory."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}", f"--rows={folder}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode and side != "usual":
        raise SystemExit(f"the side {side} failed")
    return None if done.returncode else json.loads(done.stdout.splitlines()[-1]) if side != "rows" else None


def figures(turns: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Tokens a second, the median of the steps of the later halves; the largest peak. {}: it failed."""
    done = [turn for turn in turns if "failed" not in turn]
    if not done:
        return {}
    speeds = [
        tokens / seconds
        for turn in done
        for tokens, seconds in list(zip(turn["tokens"], turn["seconds"], strict=True))[len(turn["tokens"]) // 2 :]
    ]
    return {"tokens_per_second": median(speeds), "peak_gb": max(turn["peak_gb"] for turn in done)}


def check_losses(sides: dict[str, list[dict[str, Any]]]) -> None:
    """Step by step against ragjax's; a drawn gradient leads to other weights, so there the first step alone."""
    expected = sides["ragjax"][0]
    for name, turns in sides.items():
        for turn in turns:
            if "failed" not in turn:
                count = 1 if name == "drawn" else None
                # Passages are what the untrained embedder finds; one that learns finds another now and then.
                read = sum(turn["tokens"]) / sum(expected["tokens"])
                assert abs(read - 1) < SAME_ROWS, f"{name} read other prompts"
                np.testing.assert_allclose(
                    turn["losses"][:count], expected["losses"][:count], rtol=AGREEMENT, err_msg=name
                )


def write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # KiB, on Linux


# ---- ragjax


def config_of(flags: argparse.Namespace, folder: str, **changes: Any) -> Any:
    from ragjax.config import RunConfig

    values = {"max_steps": flags.steps, "dev_every": 0, "keep": "last", "run_dir": folder}
    return RunConfig(data=flags.data, batch_size=flags.batch_size, **values | changes)


def train_ragjax(flags: argparse.Namespace) -> dict[str, Any]:
    import contextlib

    from ragjax.runs import prepare
    from ragjax.training.loop import Trainer
    from ragjax.training.records import MetricsLog
    from ragjax.training.strategies import STRATEGIES

    (joint,) = STRATEGIES["joint"]
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(config_of(flags, folder, backward_passages=2 if flags.side == "drawn" else 0))
        with contextlib.closing(MetricsLog(run.files)) as log:
            trainer = Trainer(run, joint, log)
            log.start_phase(joint.name)
            steps = [trainer.advance() for _ in range(flags.steps)]
    return {
        "losses": [line["loss"] for line, _, _ in steps],
        "seconds": [seconds for _, seconds, _ in steps],
        "tokens": [tokens for _, _, tokens in steps],
        "peak_gb": peak_gb(),
    }


def write_rows(flags: argparse.Namespace) -> None:
    """What every step reads, the adapters as they start, and where the models lie."""
    from ragjax.runs import prepare
    from ragjax.training.signals import AnswerAssembler
    from ragjax.training.state import linear_schedule
    from ragjax.training.strategies import STRATEGIES

    (joint,) = STRATEGIES["joint"]
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(config_of(flags, folder))
        config, pipeline = run.config, run.pipeline
        sampler = AnswerAssembler(run, joint.trains).sampler
        steps = []
        for step in range(flags.steps):
            batch = sampler.training_batch(step)
            found = pipeline.retrieve([question.question for question in batch.questions], config.top_k)
            vectors = pipeline.retriever.vectors.vectors_of(found.passage_rows)
            steps.append(
                {
                    "factor": float(linear_schedule(step, flags.steps, config.warmup_fraction)),
                    "questions": [
                        question_of(pipeline, question, tokens, rows, own.tolist())
                        for question, tokens, rows, own in zip(
                            batch.questions, batch.tokens, found.passage_rows, vectors, strict=True
                        )
                    ],
                }
            )
    facts = {name: getattr(config, name) for name in SETTINGS}
    facts |= {f"{model}_lr": rate for model, rate in joint.learning_rates(config).items()}
    facts |= {model: str(getattr(run, model).source.path) for model in ("embedder", "generator")}
    (flags.rows / "rows.json").write_text(json.dumps({"facts": facts, "steps": steps}), encoding="utf-8")
    layers = run.generator.lora["layers"]
    np.savez(
        flags.rows / "adapters.npz",
        **{name: np.asarray(part["lora_a"]) for block in layers.values() for name, part in block.items()},
    )


def question_of(
    pipeline: Any, question: Any, tokens: Sequence[int], rows: np.ndarray, vectors: list[list[float]]
) -> dict[str, Any]:
    answer = pipeline.prompts.answer(question.answers[0])
    prompts = [
        pipeline.prompts.prompt([passage], question.question, reserve=len(answer)).ids
        for passage in pipeline.passages(rows)
    ]
    return {"tokens": list(tokens), "vectors": vectors, "prompts": [list(ids) for ids in prompts], "answer": answer}


# ---- torch, in a process that does not import jax


def train_torch(flags: argparse.Namespace) -> dict[str, Any]:
    if flags.side == "usual":
        limit = int(flags.limit_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    import torch

    read = json.loads((flags.rows / "rows.json").read_text(encoding="utf-8"))
    facts = read["facts"]
    generator, embedder = load_models(facts, np.load(flags.rows / "adapters.npz"))
    models = {
        name: [p for p in model.parameters() if p.requires_grad]
        for name, model in (("generator", generator), ("embedder", embedder))
    }
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": facts[f"{name}_lr"]} for name, group in models.items()],
        weight_decay=facts["weight_decay"],
    )
    score = answer_scores if flags.side == "tuned" else answer_scores_of_all_logits
    losses, seconds, tokens = [], [], []
    for step in read["steps"]:
        began = time.perf_counter()
        loss = joint_loss(embedder, generator, step["questions"], facts["score_scale"], score)
        optimizer.zero_grad()
        loss.backward()
        for group, (name, own) in zip(optimizer.param_groups, models.items(), strict=True):
            torch.nn.utils.clip_grad_norm_(own, facts["max_grad_norm"])
            group["lr"] = facts[f"{name}_lr"] * step["factor"]
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
        tokens.append(sum(len(ids) + len(q["answer"]) - 1 for q in step["questions"] for ids in q["prompts"]))
    return {"losses": losses, "seconds": seconds, "tokens": tokens, "peak_gb": peak_gb()}


def load_models(facts: dict[str, Any], adapters: Any) -> tuple[Any, Any]:
    """(the generator under peft's adapters, which start as ragjax's; the embedder), both in float32."""
    import peft
    import torch
    import transformers

    path = Path(facts["generator"])
    folder, file = (path.parent, path.name) if path.suffix == ".gguf" else (path, None)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    lora = peft.LoraConfig(
        r=facts["lora_rank"], lora_alpha=facts["lora_alpha"], lora_dropout=0.0, target_modules=facts["lora_targets"]
    )
    generator = peft.get_peft_model(base, lora).eval()
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if ".lora_A." in name:
                *_, layer, _, projection, _, _, _ = name.split(".")
                parameter.copy_(torch.tensor(adapters[projection][int(layer)].T))
    embedder = transformers.AutoModel.from_pretrained(facts["embedder"], add_pooling_layer=False).eval()
    return generator, embedder


def joint_loss(
    embedder: Any, generator: Any, questions: Sequence[dict[str, Any]], scale: float, score: Callable[..., Any]
) -> Any:
    """RAG-Token's negative log-likelihood an answer."""
    import torch

    tokens, mask = padded([question["tokens"] for question in questions])
    states = embedder(tokens, attention_mask=mask.long()).last_hidden_state
    pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    vectors = torch.nn.functional.normalize(pooled, dim=-1)
    passages = torch.tensor([question["vectors"] for question in questions])
    docs = torch.log_softmax(scale * torch.einsum("be,bke->bk", vectors, passages), dim=-1)
    scores = score(generator, questions)
    total, start = scores.new_zeros(()), 0
    for prior, question in zip(docs, questions, strict=True):
        count, length = len(question["prompts"]), len(question["answer"])
        under = scores[start : start + count * length].view(count, length)
        total = total - torch.logsumexp(prior[:, None] + under, dim=0).sum()
        start += count * length
    return total / len(questions)


def answer_scores(generator: Any, questions: Sequence[dict[str, Any]]) -> Any:
    """log p of every answer token under every passage, one after another; the head where answers are."""
    import torch

    causal = generator.base_model.model
    rows, places = rows_of(questions)
    hidden = causal.model(padded(rows)[0], use_cache=False).last_hidden_state
    predicting = torch.cat([hidden[row, place] for row, place in enumerate(places)])
    logits = causal.lm_head(predicting)
    return -torch.nn.functional.cross_entropy(logits, targets_of(questions), reduction="none")


def answer_scores_of_all_logits(generator: Any, questions: Sequence[dict[str, Any]]) -> Any:
    """The same from the model as it is called."""
    import torch

    rows, places = rows_of(questions)
    tokens, mask = padded(rows)
    log_probs = torch.log_softmax(generator(tokens, attention_mask=mask.long(), use_cache=False).logits, dim=-1)
    predicting = torch.cat([log_probs[row, place] for row, place in enumerate(places)])
    return predicting.gather(-1, targets_of(questions)[:, None])[:, 0]


def rows_of(questions: Sequence[dict[str, Any]]) -> tuple[list[list[int]], list[slice]]:
    """Each prompt with its answer, and where its answer is predicted."""
    pairs = [(ids, question["answer"]) for question in questions for ids in question["prompts"]]
    rows = [[*ids, *answer[:-1]] for ids, answer in pairs]
    return rows, [slice(len(ids) - 1, len(ids) - 1 + len(answer)) for ids, answer in pairs]


def targets_of(questions: Sequence[dict[str, Any]]) -> Any:
    import torch

    return torch.tensor([token for q in questions for _ in q["prompts"] for token in q["answer"]])


def padded(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """(tokens, mask of real ones), both [R, S], right-padded."""
    import torch

    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return tokens, torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
