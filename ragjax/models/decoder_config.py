"""The shape of a decoder, and how a config.json describes it.

Notable choices
- A key that config.json lacks has the value that transformers takes for it, by model type.
- What shapes the logits is followed or refused by name; keys that transformers itself does not read for a model type
  (such as `mlp_bias` of a Qwen) are not read here either.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ragjax.errors import UserError
from ragjax.models.lora import LoraConfig
from ragjax.models.rope import RopeScaling, read_rope

# transformers' defaults, by model type. None: as many key-value heads as heads, hidden_size / heads wide.
_SHARED = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_QWEN = _SHARED | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _SHARED
    | {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
    },
    "mistral": _SHARED
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}
_WINDOW = 4096  # of Mistral, and of a Qwen that uses one, where config.json does not say
_FULL_LAYERS = 28  # of a Qwen that uses a window, counted from the first
_NULL_MEANS_NONE = ("num_key_value_heads", "sliding_window")  # any other null is as good as absent
_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder (Hugging Face's field names) and how it is computed (`dtype` and below)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    rope_scaling: RopeScaling = RopeScaling()
    sliding_window: int | None = None  # a token sees itself and the window - 1 before it
    attention_bias: bool = False  # of all four projections
    qkv_bias: bool = False  # of three: the output's has none
    qk_norm: bool = False  # norms of each head's query and key
    mlp_bias: bool = False
    dtype: str = "float32"
    scan_layers: bool = True
    decoding_layout: bool = False  # see `for_decoding`
    remat: str = "none"  # see `stack_layers`
    lora: LoraConfig | None = None
    quantize: str | None = None  # how the layers' kernels are stored; see quantize.py

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **overrides: Any) -> "DecoderConfig":
        """Reads a config.json of either spelling (rope_theta, or rope_parameters as transformers v5 writes it).

        Raises:
          UserError: naming a key that would change the result and is not followed, or whose value is of no use.
        """
        model_type = _only("model_type", config.get("model_type"), *DEFAULTS)
        _only("hidden_act", config.get("hidden_act") or "silu", "silu", "swish")
        _only("is_causal", config.get("is_causal", True), True, None)
        given = {name: value for name, value in config.items() if value is not None or name in _NULL_MEANS_NONE}
        config = DEFAULTS[model_type] | given
        sizes: dict[str, Any] = {name: _integer(config, name) for name in _INTEGERS}
        heads = sizes["num_attention_heads"]
        groups = _integer(config, "num_key_value_heads", heads)
        if heads % groups:
            raise UserError(
                f"config.json has num_attention_heads = {heads}, no multiple of num_key_value_heads = {groups}."
            )
        width = _integer(config, "head_dim", sizes["hidden_size"] // heads)
        if width % 2:
            raise UserError(f"config.json has the head width {width}, but rotary positions need an even one.")
        theta, scaling = read_rope(config)
        return cls(
            **sizes,
            num_key_value_heads=groups,
            head_dim=width,
            rms_norm_eps=_positive(config, "rms_norm_eps"),
            rope_theta=theta,
            tie_word_embeddings=bool(config["tie_word_embeddings"]),
            rope_scaling=scaling,
            sliding_window=_window(config, model_type, sizes["num_hidden_layers"]),
            attention_bias=model_type in ("llama", "qwen3") and bool(config.get("attention_bias")),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            mlp_bias=model_type == "llama" and bool(config.get("mlp_bias")),
            **overrides,
        )


def _window(config: Mapping[str, Any], model_type: str, layers: int) -> int | None:
    """The window of all layers, None where there is none. Raises UserError where only some layers have one."""
    slides = model_type == "mistral" or (model_type in ("qwen2", "qwen3") and bool(config.get("use_sliding_window")))
    slides = slides and config.get("sliding_window", _WINDOW) is not None
    window = _integer(config, "sliding_window", _WINDOW) if slides else None
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list):
        raise UserError(f"config.json has layer_types = {kinds!r} where a list is needed.")
    if model_type != "mistral" and kinds and all(kind == "full_attention" for kind in kinds):
        window = None
    elif model_type != "mistral" and window is not None and not kinds:
        full = _integer(config, "max_window_layers", _FULL_LAYERS, least=0)
        if 0 < full < layers:
            raise UserError(
                f"config.json has use_sliding_window with max_window_layers = {full}, so {layers - full} of {layers} "
                "layers have a sliding window, but this decoder gives one to all layers or to none."
            )
        window = None if full else window
    for kind in kinds:
        _only("layer_types", kind, "full_attention" if window is None else "sliding_attention")
    return window


def _only(name: str, value: Any, *supported: Any) -> Any:
    """The value. Raises UserError where it is none of those supported."""
    if value not in supported:
        *others, last = map(repr, (one for one in supported if one is not None))
        known = f"{', '.join(others)} and {last}" if others else last
        raise UserError(f"config.json has {name} = {value!r}, but this decoder supports only {known}.")
    return value


def _integer(config: Mapping[str, Any], name: str, default: int | None = None, least: int = 1) -> int:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"config.json has {name} = {value!r} where a whole number from {least} on is needed.")
    return value


def _positive(config: Mapping[str, Any], name: str) -> float:
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f"config.json has {name} = {value!r} where a number between 0 and 1 is needed.")
    return float(value)
