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
from ragjax.settings import Settings

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
        settings = Settings.of(config)
        model_type = settings.one_of("model_type", None, *DEFAULTS)
        settings.one_of("hidden_act", "silu", "silu", "swish")
        settings.one_of("is_causal", True, True)
        given = {name: value for name, value in settings.items() if value is not None or name in _NULL_MEANS_NONE}
        settings = Settings(DEFAULTS[model_type] | given, settings.where)
        sizes: dict[str, Any] = {name: settings.integer(name) for name in _INTEGERS}
        heads = sizes["num_attention_heads"]
        groups = settings.integer("num_key_value_heads", heads)
        if heads % groups:
            raise settings.fault("num_attention_heads", f", no multiple of num_key_value_heads = {groups}.")
        width = settings.integer("head_dim", sizes["hidden_size"] // heads)
        if width % 2:
            raise UserError(f"{settings.where} has the head width {width}, but rotary positions need an even one.")
        theta, scaling = read_rope(settings)
        return cls(
            **sizes,
            num_key_value_heads=groups,
            head_dim=width,
            rms_norm_eps=settings.number("rms_norm_eps", below=1),
            rope_theta=theta,
            tie_word_embeddings=settings.boolean("tie_word_embeddings"),
            rope_scaling=scaling,
            sliding_window=_window(settings, model_type, sizes["num_hidden_layers"]),
            attention_bias=model_type in ("llama", "qwen3") and settings.boolean("attention_bias"),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            mlp_bias=model_type == "llama" and settings.boolean("mlp_bias"),
            **overrides,
        )


def _window(settings: Settings, model_type: str, layers: int) -> int | None:
    """The window of all layers, None where there is none. Raises UserError where only some layers have one."""
    slides = model_type == "mistral" or (model_type in ("qwen2", "qwen3") and settings.boolean("use_sliding_window"))
    slides = slides and settings.get("sliding_window", _WINDOW) is not None
    window = settings.integer("sliding_window", _WINDOW) if slides else None
    kinds = settings.items_of("layer_types")
    if model_type != "mistral" and kinds and all(kind == "full_attention" for kind in kinds):
        window = None
    elif model_type != "mistral" and window is not None and not kinds:
        full = settings.integer("max_window_layers", _FULL_LAYERS, least=0)
        if 0 < full < layers:
            raise UserError(
                f"{settings.where} has use_sliding_window with max_window_layers = {full}, so {layers - full} of "
                f"{layers} layers have a sliding window, but this decoder gives one to all layers or to none."
            )
        window = None if full else window
    supported = "full_attention" if window is None else "sliding_attention"
    if others := [kind for kind in kinds if kind != supported]:
        raise UserError(
            f"{settings.where} has {others[0]!r} in layer_types, but here all layers have to be {supported!r}."
        )
    return window
