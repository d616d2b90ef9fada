"""Which parameter of a Hugging Face file goes where in our trees: data, read in both directions.

A row is a Hugging Face name with `{layer}` where the layer's number stands, the path of our leaf, and whether
the matrix is transposed: torch keeps a linear layer as [out, in], Flax as [in, out]. Leaves of `{layer}` rows
are stacked over layers on axis 0. The loader (load.py) turns rows into patterns; the same rows spell the
names on the way out.

Notable choices
- Names that real files spell in more than one way (`bert.` in front, `LayerNorm.gamma`, a decoder without
  `model.`) are respelled first, so that each parameter has one row.
- Weights that the models do not use stand in `unused`, and nothing else may be left over.
- A head that config.json ties to the embedding is in some files all the same: it must be equal to the
  embedding, bit by bit, and is then left out; one that differs is an error, because either reading of it
  would be a guess.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ragjax.errors import UserError
from ragjax.settings import listed


@dataclass(frozen=True)
class Row:
    """One parameter: `hf` name, `path` of our leaf, and whether the matrix is `transposed` on the way."""

    hf: str
    path: str
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        """Whether our leaf holds all layers on axis 0."""
        return "{layer}" in self.hf

    def name(self, layer: int | None = None) -> str:
        """The Hugging Face name of this parameter in one layer."""
        return self.hf.format(layer=layer) if self.stacked else self.hf

    @cached_property
    def pattern(self) -> re.Pattern:
        """The regular expression that matches the whole name, with the group `layer`."""
        return _pattern(self.hf)


@dataclass(frozen=True)
class Table:
    """All that is known about one model type's parameters."""

    rows: tuple[Row, ...]
    unused: tuple[str, ...]  # regular expressions of whole names, after respelling
    respellings: tuple[tuple[str, str], ...]  # (regular expression, replacement), each tried once, in order
    tied: tuple[str, str] | None = None  # (path of the head's leaf, path of the embedding's leaf)

    def respell(self, name: str) -> str:
        """The name as the rows spell it."""
        for pattern, replacement in self.respellings:
            name = re.sub(pattern, replacement, name)
        return name

    def find(self, name: str) -> tuple[Row, int | None] | None:
        """The row of a respelled name and the layer in it (None for a leaf that is not stacked), or None."""
        for row in self.rows:
            if match := row.pattern.fullmatch(name):
                return row, int(match["layer"]) if row.stacked else None
        return None

    def is_unused(self, name: str) -> bool:
        """Whether a respelled name is one that the models do not use and that export carries through."""
        return any(re.fullmatch(pattern, name) for pattern in self.unused)


@dataclass(frozen=True)
class Stored:
    """One parameter as it lies in a file, before anything of it is read."""

    name: str  # in Hugging Face's spelling
    file: Path
    key: str  # the name inside the file
    shape: tuple[int, ...]  # in Hugging Face's orientation
    dtype: str  # as the file calls it: F32, BF16, Q4_1, ...


@dataclass(frozen=True)
class StoredBytes(Stored):
    """One that is stored as plain numbers."""

    span: tuple[int, int]  # where its bytes begin and end in the file


@dataclass(frozen=True)
class GgufRow:
    """A GGUF tensor name, the Hugging Face name of the same parameter, and whose rotary layout may have to be
    undone.
    """

    gguf: str
    hf: str
    heads: str | None = None  # config field with the number of heads whose rows GGUF reorders in a LLaMA

    @cached_property
    def pattern(self) -> re.Pattern:
        """The regular expression that matches the whole GGUF name, with the group `layer`."""
        return _pattern(self.gguf)


def _pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d+)"))


def _linear(hf: str, path: str, bias: bool) -> tuple[Row, ...]:
    weight = Row(f"{hf}.weight", f"{path}/kernel", transposed=True)
    return (weight, Row(f"{hf}.bias", f"{path}/bias")) if bias else (weight,)


def _layer_norm(hf: str, path: str) -> tuple[Row, ...]:
    return Row(f"{hf}.weight", f"{path}/scale"), Row(f"{hf}.bias", f"{path}/bias")


_BERT_LAYER = "encoder.layer.{layer}"

BERT = Table(
    rows=(
        Row("embeddings.word_embeddings.weight", "embeddings/word_embeddings/embedding"),
        Row("embeddings.position_embeddings.weight", "embeddings/position_embeddings/embedding"),
        Row("embeddings.token_type_embeddings.weight", "embeddings/token_type_embeddings/embedding"),
        *_layer_norm("embeddings.LayerNorm", "embeddings/LayerNorm"),
        *_linear(f"{_BERT_LAYER}.attention.self.query", "encoder/layer/attention/self/query", bias=True),
        *_linear(f"{_BERT_LAYER}.attention.self.key", "encoder/layer/attention/self/key", bias=True),
        *_linear(f"{_BERT_LAYER}.attention.self.value", "encoder/layer/attention/self/value", bias=True),
        *_linear(f"{_BERT_LAYER}.attention.output.dense", "encoder/layer/attention/output/dense", bias=True),
        *_layer_norm(f"{_BERT_LAYER}.attention.output.LayerNorm", "encoder/layer/attention/output/LayerNorm"),
        *_linear(f"{_BERT_LAYER}.intermediate.dense", "encoder/layer/intermediate/dense", bias=True),
        *_linear(f"{_BERT_LAYER}.output.dense", "encoder/layer/output/dense", bias=True),
        *_layer_norm(f"{_BERT_LAYER}.output.LayerNorm", "encoder/layer/output/LayerNorm"),
    ),
    unused=(
        r"pooler\..+",
        r"embeddings\.position_ids",
        r"cls\..+",
    ),  # cls: the head of a masked language model
    respellings=(
        (r"^bert\.", ""),
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
    ),
)

MPNET = Table(
    rows=(
        Row("embeddings.word_embeddings.weight", "embeddings/word_embeddings/embedding"),
        Row("embeddings.position_embeddings.weight", "embeddings/position_embeddings/embedding"),
        *_layer_norm("embeddings.LayerNorm", "embeddings/LayerNorm"),
        Row("encoder.relative_attention_bias.weight", "encoder/relative_attention_bias/embedding"),
        *_linear(f"{_BERT_LAYER}.attention.attn.q", "encoder/layer/attention/attn/q", bias=True),
        *_linear(f"{_BERT_LAYER}.attention.attn.k", "encoder/layer/attention/attn/k", bias=True),
        *_linear(f"{_BERT_LAYER}.attention.attn.v", "encoder/layer/attention/attn/v", bias=True),
        *_linear(f"{_BERT_LAYER}.attention.attn.o", "encoder/layer/attention/attn/o", bias=True),
        *_layer_norm(f"{_BERT_LAYER}.attention.LayerNorm", "encoder/layer/attention/LayerNorm"),
        *_linear(f"{_BERT_LAYER}.intermediate.dense", "encoder/layer/intermediate/dense", bias=True),
        *_linear(f"{_BERT_LAYER}.output.dense", "encoder/layer/output/dense", bias=True),
        *_layer_norm(f"{_BERT_LAYER}.output.LayerNorm", "encoder/layer/output/LayerNorm"),
    ),
    unused=(
        r"pooler\..+",
        r"embeddings\.position_ids",
        r"lm_head\..+",
    ),
    respellings=((r"^mpnet\.", ""),),
)

_LLAMA_LAYER = "model.layers.{layer}"

LLAMA = Table(
    rows=(
        Row("model.embed_tokens.weight", "embed_tokens/embedding"),
        Row(f"{_LLAMA_LAYER}.input_layernorm.weight", "layers/input_layernorm/scale"),
        Row(f"{_LLAMA_LAYER}.post_attention_layernorm.weight", "layers/post_attention_layernorm/scale"),
        *_linear(f"{_LLAMA_LAYER}.self_attn.q_proj", "layers/self_attn/q_proj", bias=True),
        *_linear(f"{_LLAMA_LAYER}.self_attn.k_proj", "layers/self_attn/k_proj", bias=True),
        *_linear(f"{_LLAMA_LAYER}.self_attn.v_proj", "layers/self_attn/v_proj", bias=True),
        *_linear(f"{_LLAMA_LAYER}.self_attn.o_proj", "layers/self_attn/o_proj", bias=True),
        Row(f"{_LLAMA_LAYER}.self_attn.q_norm.weight", "layers/self_attn/q_norm/scale"),
        Row(f"{_LLAMA_LAYER}.self_attn.k_norm.weight", "layers/self_attn/k_norm/scale"),
        *_linear(f"{_LLAMA_LAYER}.mlp.gate_proj", "layers/mlp/gate_proj", bias=True),
        *_linear(f"{_LLAMA_LAYER}.mlp.up_proj", "layers/mlp/up_proj", bias=True),
        *_linear(f"{_LLAMA_LAYER}.mlp.down_proj", "layers/mlp/down_proj", bias=True),
        Row("model.norm.weight", "norm/scale"),
        *_linear("lm_head", "lm_head", bias=False),
    ),
    unused=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),  # a buffer that older files kept
    respellings=((r"^(?=(embed_tokens|layers|norm)\.)", "model."),),
    tied=("lm_head/kernel", "embed_tokens/embedding"),
)


def _ranker(encoder: Table, dense: str, out_proj: str) -> Table:
    """The table of an encoder with a head that scores pairs (models/rankers.py), which some call a pooler."""
    backbone = tuple(replace(row, path=f"backbone/{row.path}") for row in encoder.rows)
    head = (*_linear(dense, "head/dense", bias=True), *_linear(out_proj, "head/out_proj", bias=True))
    unused = tuple(pattern for pattern in encoder.unused if not re.match(pattern, f"{dense}.weight"))
    return replace(encoder, rows=backbone + head, unused=unused)


# Keys: config.json's model_type. Of cross-encoders.
RANKER_TABLES: dict[str, Table] = {
    "bert": _ranker(BERT, "pooler.dense", "classifier"),
    "mpnet": _ranker(MPNET, "classifier.dense", "classifier.out_proj"),
}
# Of embedders and generators.
TABLES: dict[str, Table] = {
    "bert": BERT,
    "mpnet": MPNET,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}

_GGUF_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}

GGUF_LLAMA: tuple[GgufRow, ...] = (
    GgufRow("token_embd.weight", "model.embed_tokens.weight"),
    *(
        GgufRow(f"blk.{{layer}}.{part}.{kind}", f"{_LLAMA_LAYER}.{hf}.{kind}", _GGUF_HEADS.get(part))
        for part, hf in _GGUF_PARTS.items()
        for kind in (("weight",) if part.endswith("norm") else ("weight", "bias"))
    ),
    GgufRow("output_norm.weight", "model.norm.weight"),
    GgufRow("output.weight", "lm_head.weight"),
)


def table_for(model_type: object, where: object) -> Table:
    """The table of a model type. Raises UserError, naming `where`, for a type that is not supported."""
    if not isinstance(model_type, str) or model_type not in TABLES:
        encoders = [name for name, table in TABLES.items() if table is not LLAMA]
        decoders = [name for name, table in TABLES.items() if table is LLAMA]
        raise UserError(
            f"{where}: model_type {model_type!r} is not supported by this version, which reads embedders of the types "
            f"{listed(encoders)}, and generators of the types {listed(decoders)}: choose another model"
        )
    return TABLES[model_type]


# How the tensors of quantised weights are called, the most telling first.
_QUANTISED_NAMES = (
    (r".+\.quant_state\.bitsandbytes__\w+|.+\.(absmax|SCB)", "bitsandbytes"),
    (r".+\.g_idx", "gptq"),
    (r".+\.qweight|.+\.qzeros", "gptq or awq"),
    (r".+\.weight_packed", "compressed-tensors"),
    (r".+\.weight_scale(_inv|_2)?|.+\.input_scale", "fp8"),
)


def quantisation_of(names: Iterable[str]) -> str | None:
    """What quantised the weights whose parameters have these names, or None for plain ones."""
    names = list(names)
    for pattern, method in _QUANTISED_NAMES:
        if any(re.fullmatch(pattern, name) for name in names):
            return method
    return None


def quantised_message(where: object, method: str) -> str:
    """Why weights that another tool has quantised are refused."""
    return (
        f"{where}: these weights are quantised ({method}), which is not read: choose the model before quantisation, "
        "with --quantize=nf4 where memory is short, or a .gguf file of it"
    )
