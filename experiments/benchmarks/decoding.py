"""Throughput of greedy decoding against transformers' `generate`: same weights, prompts, dtype and device.

    python experiments/benchmarks/decoding.py --data=$RAGJAX_DATA/hotpotqa --out=decoding.hotpotqa.json

Prompts of questions with their top-5 passages concatenated. For each batch size both sides read the prompts (prefill),
go on from what they have kept of them for a fixed number of tokens, whatever these are (decode), and answer from the
start to the end token (answer), turn by turn, so that a slow minute meets both; medians of the turns. Tokens are the
prompts' own, padding apart. ragjax's copy of the layers for decoding is made once, as ragjax.evaluate does.
Needs the parity extra.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
import torch
from provenance import provenance
from torch_lora_yardstick import load_torch_model

from ragjax.config import RunConfig
from ragjax.data.batches import pad_tokens, round_up
from ragjax.data.dataset import load_dataset
from ragjax.files import write_json
from ragjax.generation import Rule, beam_search
from ragjax.pipeline import build_pipeline, load_models

# No adapters: transformers has none either.
CONFIG = RunConfig(lora_rank=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample")
    parser.add_argument("--batch_sizes", default="1,8")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens that decoding goes on for")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    dataset = load_dataset(flags.data)
    pipeline = build_pipeline(CONFIG, dataset, *load_models(CONFIG))
    theirs = load_torch_model(pipeline)
    questions = [question.question for question in dataset.test]
    results = {}
    for batch_size in map(int, flags.batch_sizes.split(",")):
        rows = pipeline.retrieve(questions[:100], CONFIG.top_k).passage_rows
        prompts = [
            pipeline.prompts.prompt(pipeline.passages(found), text, reserve=flags.new_tokens).ids
            for text, found in zip(questions, rows, strict=False)
        ]
        chosen = prompts[: flags.turns * batch_size]
        results[batch_size] = measure(pipeline.generator, theirs, chosen, batch_size, flags.new_tokens)
        print(batch_size, {name: value for name, value in results[batch_size].items() if name != "seconds"})
        write_json(
            flags.out,
            {
                **provenance("torch", "transformers"),
                "threads": torch.get_num_threads(),
                "data": {"name": dataset.name, "sha256": dataset.sha256},
                "generator": pipeline.generator.describe(),
                "new_tokens": flags.new_tokens,
                "batch_sizes": results,
            },
        )


def measure(ours: Any, theirs: Any, prompts: Sequence[list[int]], batch_size: int, new_tokens: int) -> dict[str, Any]:
    """Seconds of every turn, and the rates and ratios of their medians."""
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    sides = {"ragjax": Ours(ours, new_tokens), "transformers": Theirs(theirs, ours, new_tokens)}
    seconds: dict[str, dict[str, list[float]]] = {
        name: {part: [] for part in ("prefill", "decode", "answer")} for name in sides
    }
    for name, side in sides.items():
        for batch in batches if name == "ragjax" else batches[:1]:  # each length of ours is compiled once
            side.go_on(side.prefill(batch))
            side.answer(batch)
    for batch in batches:
        for name, side in sides.items():
            prefill, kept = timed(side.prefill, batch)
            decode, new = timed(side.go_on, kept)
            answer, _ = timed(side.answer, batch)
            seconds[name]["prefill"].append(prefill / sum(map(len, batch)))
            seconds[name]["decode"].append(decode / (len(batch) * new))
            seconds[name]["answer"].append(answer / len(batch))
    rates = {name: {part: 1 / median(values) for part, values in parts.items()} for name, parts in seconds.items()}
    ratios = {part: rates["ragjax"][part] / rates["transformers"][part] for part in ("prefill", "decode", "answer")}
    return {
        "prompt_tokens": [sum(map(len, batch)) for batch in batches],
        "per_second": rates,
        "ratios": ratios,
        "seconds": seconds,
    }


def timed(call: Callable[[Any], Any], argument: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call(argument)
    return time.perf_counter() - began, result


class Ours:
    def __init__(self, generator: Any, new_tokens: int):
        self._generator, self._rule = generator.prepared(), Rule(new_tokens, end_ids=(-1,))

    def prefill(self, prompts: Sequence[list[int]]) -> Any:
        tokens, lengths = pad_tokens(prompts, len(prompts), round_up(max(map(len, prompts)), 64))
        generator = self._generator
        is_unstacked = generator.steps[0].config.decoding_layout
        return jax.block_until_ready(
            beam_search.prefill(generator.module, generator.variables, tokens, lengths, is_unstacked)
        )

    def go_on(self, kept: Any) -> int:
        """How many tokens each row has got."""
        last, prompts = kept
        rows, rule = len(prompts.lengths), self._rule
        weights, asked, seeds = np.zeros((rows, 1), np.float32), np.ones(rows, bool), np.zeros(rows, np.uint32)
        state = beam_search.begin(*self._generator.steps, last, weights, asked, seeds, rule)
        state = beam_search.advance(
            *self._generator.steps, prompts, weights, seeds, state, rule.max_new_tokens + 1, rule
        )
        assert (np.asarray(state.ended_lengths) == rule.max_new_tokens).all()
        return rule.max_new_tokens

    def answer(self, prompts: Sequence[list[int]]) -> None:
        self._generator.decode_answers([[ids] for ids in prompts], np.zeros((len(prompts), 1)), CONFIG, len(prompts))


class Theirs:
    def __init__(self, model: Any, ours: Any, new_tokens: int):
        self._model, self._ends, self._new_tokens = model, list(ours.end_ids), new_tokens

    def _inputs(self, prompts: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Left-padded, as `generate` wants it."""
        longest = max(map(len, prompts))
        tokens = np.zeros((len(prompts), longest), np.int64)
        mask = np.zeros_like(tokens)
        for row, ids in enumerate(prompts):
            tokens[row, longest - len(ids) :] = ids
            mask[row, longest - len(ids) :] = 1
        return {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}

    def _generate(self, inputs: dict[str, Any], **options: Any) -> Any:
        with torch.no_grad():
            return self._model.generate(**inputs, do_sample=False, pad_token_id=self._ends[0], **options)

    def prefill(self, prompts: Sequence[list[int]]) -> dict[str, Any]:
        """The prompts and their first new token, with a cache of the prompts."""
        inputs = self._inputs(prompts)
        begun = self._generate(inputs, max_new_tokens=1, return_dict_in_generate=True)
        mask = inputs["attention_mask"]
        return {
            "input_ids": begun.sequences,
            "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1),
            "past_key_values": begun.past_key_values,
        }

    def go_on(self, kept: dict[str, Any]) -> int:
        """How many tokens each row has got."""
        self._generate(kept, min_new_tokens=self._new_tokens, max_new_tokens=self._new_tokens)
        return self._new_tokens

    def answer(self, prompts: Sequence[list[int]]) -> None:
        self._generate(self._inputs(prompts), max_new_tokens=CONFIG.max_new_tokens, eos_token_id=self._ends)


if __name__ == "__main__":
    main()
