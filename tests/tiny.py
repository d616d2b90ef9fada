"""Tiny random models in real folder formats: everything that loads a model is tested on these, without a hub.

Every parameter is random, norms and biases included, so that one which is left out, transposed or read from the
wrong place shows. The folders have what real ones have: tokenizer, pooling settings, weights that no model uses.
"""

import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ragjax.weights.packages import PACKAGES, SLICED

STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LLAMA_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What the byte-level merges are learned from, and the whole words that the WordPiece vocabulary knows.
TEXT = """The river runs past the old town and under the stone bridge to the sea. Which country is the town in?
The capital of the country is a city of the north. Who wrote the book about the war? The author was born in the city.
### Context: ### Question: ### Answer: What is the name of the person who was the first to answer the question?"""


def write_tiny_bert(folder: str | os.PathLike, seed: int = 0, **config_overrides: Any) -> Path:
    """Writes a sentence-transformers folder of a BERT with 2 layers of width 32; returns the folder.

    `config_overrides` are fields of config.json; `torch_dtype` is also the dtype that the weights are stored in.
    """
    tokenizer = bert_tokenizer()
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "torch_dtype": "float32",
        "type_vocab_size": 2,
        "vocab_size": tokenizer.get_vocab_size(),
    } | config_overrides
    specials = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    return _write_encoder(_folder(folder), config, bert_weights(config, seed), tokenizer, specials)


def write_tiny_mpnet(folder: str | os.PathLike, seed: int = 0, **config_overrides: Any) -> Path:
    """Writes a sentence-transformers folder of an MPNet with 2 layers of width 32; returns the folder.

    `config_overrides` are fields of config.json; `torch_dtype` is also the dtype that the weights are stored in.
    """
    tokenizer = mpnet_tokenizer()
    config = {
        "architectures": ["MPNetForMaskedLM"],
        "model_type": "mpnet",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 514,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 1,
        "relative_attention_num_buckets": 32,
        "torch_dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(),
    } | config_overrides
    specials = {"unk_token": "[UNK]", "sep_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>"}
    specials |= {"bos_token": "<s>", "eos_token": "</s>"}
    return _write_encoder(_folder(folder), config, mpnet_weights(config, seed), tokenizer, specials)


def _write_encoder(
    folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray], tokenizer: Tokenizer, specials: dict[str, str]
) -> Path:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.enable_truncation(max_length=16)  # as in real folders, to be ignored
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", specials | {"do_lower_case": True, "model_max_length": 512})
    _write_json(folder / "config.json", config)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds.items())
    ]
    _write_json(folder / "modules.json", modules)
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
    _write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": config["hidden_size"]} | modes)
    return folder


def write_tiny_llama(folder: str | os.PathLike, seed: int = 0, **config_overrides: Any) -> Path:
    """Writes a Hugging Face folder of a LLaMA with 2 layers of width 32, 4 query and 2 key-value heads; with another
    `model_type`, of that type.

    `config_overrides` are fields of config.json; `torch_dtype` is also the dtype that the weights are stored in.
    Returns the folder.
    """
    folder = _folder(folder)
    tokenizer = llama_tokenizer()
    config = llama_config(tokenizer) | config_overrides
    save_file(llama_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    _write_json(folder / "tokenizer_config.json", roles | {"chat_template": CHAT_TEMPLATE})
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": config["eos_token_id"]})
    return folder


def write_tiny_gguf(
    path: str | os.PathLike,
    seed: int = 0,
    kind: str = "F32",
    edit: Callable[[gguf.GGUFWriter], Any] = lambda writer: None,
    tensors_a_part: int = 0,
    pre: str = "smollm",
    **config_overrides: Any,
) -> Path:
    """Writes the model of `write_tiny_llama(seed=seed)` as a GGUF file in llama.cpp's layout; returns the path.

    `kind`: "F32", "F16", or a quantisation such as "Q8_0", which the matrices are then stored in; `edit` completes the
    file; `tensors_a_part` splits it into files NAME-00001-of-0000N.gguf; `pre` names how its tokenizer cuts texts.
    """
    tokenizer = llama_tokenizer()
    config = llama_config(tokenizer) | config_overrides
    writer = gguf.GGUFWriter(str(path), config["model_type"], split_max_tensors=tensors_a_part)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if "head_dim" in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config["model_type"] == "llama":
        writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    _add_gguf_tokenizer(writer, tokenizer, config, pre)
    for name, weight in llama_weights(config, seed).items():
        key, weight = gguf_name(name), weight.astype(np.float32)
        for part, heads in (("attn_q.", "num_attention_heads"), ("attn_k.", "num_key_value_heads")):
            if part in key and config["model_type"] == "llama":
                weight = llama_cpp_permute(weight, config[heads])
        storage = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        writer.add_tensor(key, gguf.quants.quantize(weight, storage), raw_dtype=storage)
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def bert_weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random weights of a BERT under Hugging Face's names, the unused pooler and position ids included."""
    wide, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], wide),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], wide),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], wide),
        "pooler.dense.weight": (wide, wide),
        "pooler.dense.bias": (wide,),
    }
    norms, linears = ["embeddings.LayerNorm"], {}
    for layer in range(config["num_hidden_layers"]):
        start = f"encoder.layer.{layer}"
        norms += [f"{start}.attention.output.LayerNorm", f"{start}.output.LayerNorm"]
        linears |= {f"{start}.attention.self.{part}": (wide, wide) for part in ("query", "key", "value")}
        linears |= {
            f"{start}.attention.output.dense": (wide, wide),
            f"{start}.intermediate.dense": (inner, wide),
            f"{start}.output.dense": (wide, inner),
        }
    shapes |= {f"{name}.{part}": (wide,) for name in norms for part in ("weight", "bias")}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    weights = _random(shapes, config, seed)
    return weights | {"embeddings.position_ids": np.arange(config["max_position_embeddings"])[None]}


def mpnet_weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random weights of an MPNet under Hugging Face's names, the unused pooler and position ids included."""
    wide, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], wide),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], wide),
        "encoder.relative_attention_bias.weight": (
            config["relative_attention_num_buckets"],
            config["num_attention_heads"],
        ),
        "pooler.dense.weight": (wide, wide),
        "pooler.dense.bias": (wide,),
    }
    norms, linears = ["embeddings.LayerNorm"], {}
    for layer in range(config["num_hidden_layers"]):
        start = f"encoder.layer.{layer}"
        norms += [f"{start}.attention.LayerNorm", f"{start}.output.LayerNorm"]
        linears |= {f"{start}.attention.attn.{part}": (wide, wide) for part in "qkvo"}
        linears |= {f"{start}.intermediate.dense": (inner, wide), f"{start}.output.dense": (wide, inner)}
    shapes |= {f"{name}.{part}": (wide,) for name in norms for part in ("weight", "bias")}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    weights = _random(shapes, config, seed)
    return weights | {"embeddings.position_ids": np.arange(config["max_position_embeddings"])[None]}


def llama_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json of the tiny LLaMA."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(),
    }


def llama_weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random weights of a LLaMA, Mistral or Qwen under Hugging Face's names; with a tied head, no lm_head.weight."""
    wide, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or wide // config["num_attention_heads"]
    queries, keys = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], wide)}
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}"
        shapes |= {
            f"{start}.input_layernorm.weight": (wide,),
            f"{start}.post_attention_layernorm.weight": (wide,),
            f"{start}.self_attn.q_proj.weight": (queries, wide),
            f"{start}.self_attn.k_proj.weight": (keys, wide),
            f"{start}.self_attn.v_proj.weight": (keys, wide),
            f"{start}.self_attn.o_proj.weight": (wide, queries),
            f"{start}.mlp.gate_proj.weight": (inner, wide),
            f"{start}.mlp.up_proj.weight": (inner, wide),
            f"{start}.mlp.down_proj.weight": (wide, inner),
        }
        for room, field in (("self_attn", "attention_bias"), ("mlp", "mlp_bias")):
            if config[field]:
                matrices = {name: shape for name, shape in shapes.items() if name.startswith(f"{start}.{room}.")}
                shapes |= {name.replace(".weight", ".bias"): shape[:1] for name, shape in matrices.items()}
        if config["model_type"] == "qwen2":
            shapes |= {f"{start}.self_attn.{part}_proj.bias": (keys,) for part in "kv"}
            shapes[f"{start}.self_attn.q_proj.bias"] = (queries,)
        if config["model_type"] == "qwen3":
            shapes |= {f"{start}.self_attn.{part}_norm.weight": (head,) for part in "qk"}
    shapes["model.norm.weight"] = (wide,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], wide)
    return _random(shapes, config, seed)


def bert_tokenizer() -> Tokenizer:
    """A lower-casing WordPiece tokenizer: all printable ASCII, a few whole words, [CLS] text [SEP]."""
    return _wordpiece_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], first="[CLS]", last="[SEP]")


def mpnet_tokenizer() -> Tokenizer:
    """The same with MPNet's specials: <s> text </s>, of a pair <s> text </s> </s> text </s>."""
    tokenizer = _wordpiece_tokenizer(["<s>", "<pad>", "</s>", "[UNK]", "<mask>"], first="<s>", last="</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def _wordpiece_tokenizer(specials: list[str], first: str, last: str) -> Tokenizer:
    symbols = sorted({chr(code).lower() for code in range(33, 127)})
    words = sorted({word.strip(".,:?#").lower() for word in TEXT.split()} - set(symbols) - {""})
    vocabulary = [*specials, *symbols, *(f"##{s}" for s in symbols), *words]
    vocabulary += [f"[unused{index}]" for index in range(300 - len(vocabulary))]
    tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(token, specials.index(token)) for token in (first, last)],
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return tokenizer


def llama_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer with SmolLM's digit rule: three specials, 256 bytes, merges learned from TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in LLAMA_SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def gguf_name(name: str) -> str:
    """llama.cpp's name of a LLaMA parameter, spelled out apart from the table under test."""
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
        "q_norm": "attn_q_norm",
        "k_norm": "attn_k_norm",
    }
    whole = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    words = name.split(".")
    if "layers" in words:
        return f"blk.{words[words.index('layers') + 1]}.{parts[words[-2]]}.{words[-1]}"
    return f"{whole[words[-2]]}.weight"


def llama_cpp_permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads * H, D] as llama.cpp stores them, row by row: (i, i + H/2) become neighbours."""
    width = weight.shape[0] // heads
    rows = [
        head * width + half * (width // 2) + i for head in range(heads) for i in range(width // 2) for half in (0, 1)
    ]
    return weight[rows]


def _add_gguf_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, config: dict[str, Any], pre: str) -> None:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in LLAMA_SPECIALS else normal for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _random(shapes: dict[str, tuple[int, ...]], config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Normal numbers around 1 for norm weights and 0 for all else, from one stream in the order of the names."""
    generator = np.random.default_rng(seed)
    stored = STORED[config["torch_dtype"]]
    weights = {}
    for name in sorted(shapes):
        centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        weights[name] = (centre + 0.2 * generator.standard_normal(shapes[name])).astype(stored)
    return weights


def _folder(path: str | os.PathLike) -> Path:
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def require_package(distribution: str) -> None:
    """Skips the calling test when a weight package of third_party/ is not installed."""
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the weight package {distribution} is not installed: run `make weights`")


def require_model(short: str) -> None:
    """Skips the calling test when no installed package, and no join of several, gives the model of this name."""
    if any(model.short == short and model.joined.is_dir() for model in SLICED):
        return
    for package in [*PACKAGES, *(package for model in SLICED for package in model.slices)]:
        if package.short == short:
            require_package(package.distribution)
