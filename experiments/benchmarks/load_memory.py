"""Loads a LLaMA-3-8B-shaped checkpoint into 4 bits and reports the memory at its peak, and GB/s.

    python experiments/benchmarks/load_memory.py --folder=FOLDER --out=experiments/results/load_memory.json

Writes random bfloat16 weights of the real config.json's shapes (16 GB, in four shards) unless the folder holds them
already, then loads them as a command would. `rss_anon_shmem` is what the process itself takes (RssAnon + RssShmem,
sampled every 20 ms); `vm_hwm` counts the mapped pages of the weight files as well, which the system may drop.
"""

import argparse
import json
import resource
import threading
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from provenance import provenance
from safetensors.numpy import save_file

from ragjax.files import write_json
from ragjax.models.decoder_config import DecoderConfig
from ragjax.parallel import Replicated
from ragjax.pretrained import abstract_decoder
from ragjax.weights import load_params, resolve_model

# meta-llama/Meta-Llama-3-8B-Instruct.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
SHARDS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--quantize", default="nf4", choices=("nf4", "int8"))
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    if not (flags.folder / "model.safetensors.index.json").is_file():
        write_checkpoint(flags.folder)
    source = resolve_model(flags.folder)
    abstract = abstract_decoder(DecoderConfig.from_hf(CONFIG))["params"]
    before = memory()
    with Sampler() as sampler:
        began = time.perf_counter()
        params = jax.block_until_ready(load_params(source, abstract, "bfloat16", flags.quantize, Replicated().load))
        seconds = time.perf_counter() - began
    stored = sum(file.stat().st_size for file in source.files)
    leaves = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    result = {
        **provenance(),
        "quantize": flags.quantize,
        "file_bytes": stored,
        "array_bytes": sum(leaves),
        "largest_leaf_bytes": max(leaves),
        "rss_anon_shmem_before": before,
        "rss_anon_shmem_peak": sampler.peak,
        "vm_hwm": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": round(seconds, 1),
        "gb_per_second": round(stored / seconds / 1e9, 3),
    }
    print(json.dumps(result, indent=1))
    write_json(flags.out, result)


def write_checkpoint(folder: Path) -> None:
    """Normal numbers of deviation 0.02, drawn once and reused: their values do not matter here, their number does."""
    folder.mkdir(parents=True, exist_ok=True)
    wide, inner, keys = CONFIG["hidden_size"], CONFIG["intermediate_size"], 1024
    shapes = {"model.embed_tokens.weight": (CONFIG["vocab_size"], wide)}
    for layer in range(CONFIG["num_hidden_layers"]):
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.{name}.weight": (wide,) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, outputs in (("q_proj", wide), ("k_proj", keys), ("v_proj", keys), ("o_proj", wide)):
            shapes[f"{start}.self_attn.{name}.weight"] = (outputs, wide)
        for name, shape in (("gate_proj", (inner, wide)), ("up_proj", (inner, wide)), ("down_proj", (wide, inner))):
            shapes[f"{start}.mlp.{name}.weight"] = shape
    shapes |= {"model.norm.weight": (wide,), "lm_head.weight": (CONFIG["vocab_size"], wide)}
    numbers = np.random.default_rng(0).standard_normal(1 << 24, np.float32) * np.float32(0.02)
    numbers = numbers.astype(ml_dtypes.bfloat16)
    names = list(shapes)
    weight_map, per_shard = {}, -(-len(names) // SHARDS)
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        chosen = names[shard * per_shard : (shard + 1) * per_shard]
        save_file({name: np.resize(numbers, shapes[name]) for name in chosen}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


class Sampler:
    """The highest `memory()` while it is open."""

    def __enter__(self) -> "Sampler":
        self.peak, self._open = memory(), True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._open = False
        self._thread.join()

    def _watch(self) -> None:
        while self._open:
            self.peak = max(self.peak, memory())
            time.sleep(0.02)


def memory() -> int:
    """RssAnon + RssShmem of this process, in bytes (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


if __name__ == "__main__":
    main()
