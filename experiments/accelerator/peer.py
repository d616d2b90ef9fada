"""The same work in torch: transformers, peft and sentence-transformers, on the same shapes, lengths and device.

    python experiments/accelerator/peer.py train|decode|encode [--small]

train: the joint RAG-Token step. Adapters by peft and the embedder under bfloat16 autocast (ragjax's embedder computes
in float32), attention by torch's SDPA, layers computed again in the backward pass, right-padded rows, the head where
answers are, fused AdamW on a GPU.
decode: transformers' generate, greedy, left-padded.
encode: sentence-transformers' encode of texts with as many tokens, tokenisation included.
"""

import functools
import gc
import itertools
import os
import tempfile
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # what is imported of ragjax takes none of the device's memory

import common
import numpy as np
import torch
import transformers
from common import Recorder
from random_models import examples
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KIND = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
SCALE = 20.0
NEW_TOKENS = 25  # as many as decode.py's search chooses


def run(what: str, recorder: Recorder) -> None:
    transformers.logging.set_verbosity_error()
    {"train": train, "decode": decode, "encode": encode}[what](recorder)


def timed(call: Callable[[], Any], seconds: float = 2.0) -> float:
    """Median seconds of a call, the device's work included."""

    def wait(_: Any) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return common.timed(call, wait, seconds)


def peak_bytes() -> int | None:
    """The most device memory in use since it was last asked for; what nobody refers to any more is let go first."""
    if DEVICE != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak


def language_model(small: bool) -> transformers.LlamaForCausalLM:
    """The 8B shape with random bfloat16 weights."""
    fields = common.shape_of("llama3-8b", small)
    config = transformers.LlamaConfig(**fields, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


# ---- train


def train(recorder: Recorder) -> None:
    trainer = functools.cache(lambda: Trainer(recorder.small))
    for questions in (1,) if recorder.small else (4, 8, 1):
        recorder.measure(f"joint rag_token bf16 B={questions}", lambda size=questions: trainer().measure(size))


class Trainer:
    def __init__(self, small: bool):
        import peft

        self._small = small
        self._fields = common.shape_of("llama3-8b", small)
        self._encoder_fields = common.shape_of("minilm", small)
        adapters = peft.LoraConfig(
            r=common.LORA_RANK,
            lora_alpha=common.LORA_ALPHA,
            lora_dropout=0.0,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        )
        self.generator = peft.get_peft_model(language_model(small), adapters)
        self.generator.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.generator.train()  # nothing drops out; layers are computed again in this mode only
        self.embedder = transformers.BertModel(transformers.BertConfig(**self._encoder_fields)).to(DEVICE).eval()
        self._models = [[p for p in m.parameters() if p.requires_grad] for m in (self.generator, self.embedder)]
        groups = [{"params": group, "lr": lr} for group, lr in zip(self._models, (2e-4, 1e-6), strict=True)]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=DEVICE == "cuda")

    def measure(self, questions: int) -> dict[str, Any]:
        batch = self.batch(questions)
        peak_bytes()
        seconds = timed(lambda: self._step(batch))
        loss = self._step(batch)
        tokens, real = batch["tokens"], int(batch["mask"].sum())
        weights = sum(
            p.numel() for name, p in self.generator.named_parameters() if ".layers." in name and "lora_" not in name
        )
        return {
            "seconds": seconds,
            "tokens": real,
            "padded_tokens": tokens.numel(),
            "tokens_per_second": real / seconds,
            "mfu": common.utilisation(4 * weights * real, seconds, KIND),
            "peak_bytes": peak_bytes(),
            "loss": loss,
            "ok": bool(np.isfinite(loss)),
        }

    def batch(self, questions: int) -> dict[str, Any]:
        """Right-padded rows of as many questions, on the device."""
        chosen = common.first_questions(questions, self._small)
        width = self._encoder_fields["hidden_size"]
        made = examples(chosen, self._fields["vocab_size"], self._encoder_fields["vocab_size"], width)
        tokens, mask = padded([[*prompt, *e.answer[:-1]] for e in made for prompt in e.prompts])
        return {
            "questions": padded([e.question_tokens for e in made]),
            "passages": torch.tensor(np.stack([e.passage_vectors for e in made]), device=DEVICE),
            "tokens": tokens,
            "mask": mask,
            "made": made,
        }

    def _step(self, batch: dict[str, Any]) -> float:
        self._optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = self.loss(batch)
        loss.backward()
        for group in self._models:
            torch.nn.utils.clip_grad_norm_(group, 1.0)
        self._optimizer.step()
        return loss.item()

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """RAG-Token's negative log-likelihood an answer."""
        tokens, mask = batch["questions"]
        states = self.embedder(tokens, attention_mask=mask.long()).last_hidden_state.float()
        vectors = torch.nn.functional.normalize((states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
        docs = torch.log_softmax(SCALE * torch.einsum("be,bke->bk", vectors, batch["passages"]), dim=-1)
        model = self.generator.base_model.model
        # Padding comes last, where no real token sees it: without a mask SDPA takes its fastest kernels.
        hidden = model.model(batch["tokens"], use_cache=False).last_hidden_state
        predicting, targets, row = [], [], 0
        for one in batch["made"]:
            for prompt in one.prompts:
                predicting.append(hidden[row, len(prompt) - 1 : len(prompt) - 1 + len(one.answer)])
                targets += one.answer
                row += 1
        logits = model.lm_head(torch.cat(predicting)).float()
        scores = -torch.nn.functional.cross_entropy(logits, torch.tensor(targets, device=DEVICE), reduction="none")
        total, start = scores.new_zeros(()), 0
        for prior, one in zip(docs, batch["made"], strict=True):
            count, length = len(one.prompts), len(one.answer)
            under = scores[start : start + count * length].view(count, length)
            total = total - torch.logsumexp(prior[:, None] + under, dim=0).sum()
            start += count * length
        return total / len(batch["made"])


def padded(rows: list[list[int]], left: bool = False) -> tuple[Tensor, Tensor]:
    """(tokens, mask of real ones), both [R, S] on the device."""
    length = max(map(len, rows))
    tokens, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.bool)
    for place, row in enumerate(rows):
        span = slice(length - len(row), None) if left else slice(0, len(row))
        tokens[place, span] = torch.tensor(row)
        mask[place, span] = True
    return tokens.to(DEVICE), mask.to(DEVICE)


# ---- decode


def decode(recorder: Recorder) -> None:
    model = functools.cache(lambda: language_model(recorder.small))
    for batch_size in (1, 2) if recorder.small else (8, 64, 1):
        recorder.measure(
            f"decode bf16 B={batch_size}", lambda size=batch_size: measure_decoding(model(), size, recorder.small)
        )


@torch.no_grad()
def measure_decoding(model: transformers.LlamaForCausalLM, batch_size: int, small: bool) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    chosen = [one["concatenated"] for one in common.first_questions(batch_size, small)]
    rows = [rng.integers(3, model.config.vocab_size, length).tolist() for length in chosen]
    tokens, mask = padded(rows, left=True)
    peak_bytes()
    prefill_seconds = timed(lambda: model(tokens, attention_mask=mask.long(), use_cache=True, logits_to_keep=1))
    whole = timed(
        lambda: model.generate(
            tokens,
            attention_mask=mask.long(),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    )
    seconds = whole - prefill_seconds
    return {
        "prefill_seconds": prefill_seconds,
        "prefill_tokens_per_second": sum(chosen) / prefill_seconds,
        "decode_seconds": seconds,
        "tokens_per_second": batch_size * NEW_TOKENS / seconds if seconds > 0 else None,
        "peak_bytes": peak_bytes(),
    }


# ---- encode


def encode(recorder: Recorder) -> None:
    for dtype, name in itertools.product(
        ("float32",) if recorder.small else ("bfloat16", "float32"), ("minilm", "mpnet")
    ):
        recorder.measure(f"encode {name} {dtype}", functools.partial(measure_encoding, name, dtype, recorder.small))


def measure_encoding(name: str, dtype: str, small: bool) -> dict[str, Any]:
    texts, tokens = common.word_texts(name, small)
    with tempfile.TemporaryDirectory() as folder:
        model = sentence_transformer(name, folder, small).to(DEVICE, dtype=getattr(torch, dtype))
    seconds = timed(lambda: model.encode(texts, batch_size=common.TEXTS_AT_ONCE, show_progress_bar=False), seconds=1)
    return {
        "seconds": seconds,
        "passages_per_second": len(texts) / seconds,
        "tokens_per_second": tokens / seconds,
    }


def sentence_transformer(name: str, folder: str, small: bool) -> Any:
    """The library's own modules around a random encoder; `folder` is only needed while they are made."""
    from sentence_transformers import SentenceTransformer, models

    config_type, model_type = {
        "minilm": (transformers.BertConfig, transformers.BertModel),
        "mpnet": (transformers.MPNetConfig, transformers.MPNetModel),
    }[name]
    model_type(config_type(**common.shape_of(name, small))).save_pretrained(folder)
    common.word_tokenizer(name, small).save_pretrained(folder)
    encoder = models.Transformer(folder, max_seq_length=common.LONGEST_TEXT[name])
    pooling = models.Pooling(common.shape_of(name, small)["hidden_size"], pooling_mode="mean")
    return SentenceTransformer(modules=[encoder, pooling, models.Normalize()], device=DEVICE)


if __name__ == "__main__":
    common.main(run, "train", "decode", "encode")
