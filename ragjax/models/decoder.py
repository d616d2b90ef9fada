"""A LLaMA or Mistral decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied or untied head.

Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; Jiang et al. 2023, arXiv 2310.06825, for the sliding window;
Grattafiori et al. 2024, arXiv 2407.21783, for Llama 3. Field and parameter names are Hugging Face's. The model returns
hidden states; whoever needs logits asks `logits` for just the positions it wants.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ragjax.errors import UserError
from ragjax.models.attention import attention_mask, cached_attention, causal_attention
from ragjax.models.layers import Projection, stack_layers
from ragjax.models.lora import LoraConfig
from ragjax.models.products import float32_matmul

Array = jax.Array


# What Mistral's configuration stands for where it does not say.
_MISTRAL_WINDOW = 4096


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """How Llama 3.1 stretches its rotary frequencies to longer texts (config.json's rope type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """Turns of more than original / low_freq_factor tokens are slowed by `factor`, those of fewer than
        original / high_freq_factor stay, and in between the two are mixed."""
        turns = self.original_max_position_embeddings * frequencies / (2 * np.pi)  # in the original context
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = np.clip(share, 0.0, 1.0)
        return (share + (1.0 - share) / self.factor) * frequencies


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
    rope_scaling: Llama3Rope | None = None
    sliding_window: int | None = None  # a token sees itself and the window - 1 before it
    attention_bias: bool = False
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
          UserError: naming a field that would change the result and is not supported, or that is missing.
        """
        model_type = config.get("model_type")
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or rope
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))
        window = config.get("sliding_window", _MISTRAL_WINDOW) if model_type == "mistral" else None
        layer_type = "full_attention" if window is None else "sliding_attention"
        for field, value, *supported in (
            ("model_type", model_type, "llama", "mistral"),
            ("hidden_act", config.get("hidden_act", "silu"), "silu"),
            ("rope type", rope_type, "default", "llama3"),
            ("partial_rotary_factor", rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)), 1),
            *(("layer_types", kind, layer_type) for kind in config.get("layer_types") or ()),
        ):
            if value not in supported:
                known = " and ".join(map(repr, supported))
                raise UserError(f"config.json has {field} = {value!r}, but this decoder supports only {known}.")
        try:
            heads = config["num_attention_heads"]
            return cls(
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_hidden_layers=config["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                max_position_embeddings=config["max_position_embeddings"],
                rms_norm_eps=config["rms_norm_eps"],
                rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
                rope_scaling=_llama3_rope(scaling, config) if rope_type == "llama3" else None,
                sliding_window=window,
                attention_bias=bool(config.get("attention_bias")),
                mlp_bias=bool(config.get("mlp_bias")),
                **overrides,
            )
        except KeyError as missing:
            raise UserError(f"config.json lacks {missing}, which a {model_type} model needs.") from None


def _llama3_rope(scaling: Mapping[str, Any], config: Mapping[str, Any]) -> Llama3Rope:
    original = {"original_max_position_embeddings": config.get("max_position_embeddings")}
    return Llama3Rope(**{field.name: {**original, **scaling}[field.name] for field in dataclasses.fields(Llama3Rope)})


class Slots(NamedTuple):
    """Keys and values of earlier tokens: of every layer, or of one without the axis L."""

    keys: Array  # [L, R, M, H, C], as the product with queries reads them
    values: Array  # [L, R, M, C, H]


class Prompts(NamedTuple):
    """What R prompts have left in a decoder that goes on from them."""

    slots: Slots | Sequence[Slots]  # the layers' slots one by one for what `for_decoding` gives
    lengths: Array  # [R], tokens of each prompt; what lies behind them is padding


def empty_slots(config: DecoderConfig, rows: int, slots: int) -> Slots | Sequence[Slots]:
    """Room for `slots` new tokens in each of `rows` rows."""
    layers, heads, width = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    keys = jnp.zeros((layers, rows, heads, width, slots), jnp.dtype(config.dtype))
    stacked = Slots(keys, keys.swapaxes(-1, -2))
    return unstack(stacked) if config.decoding_layout else stacked


@jax.jit
def unstack(tree: Any) -> list[Any]:
    """One tree a layer, from a tree whose arrays have a leading layer axis."""
    leaves, structure = jax.tree.flatten(tree)
    return [structure.unflatten(layer) for layer in zip(*leaves, strict=True)]


def for_decoding(module: "Decoder", variables: Mapping[str, Any]) -> tuple["Decoder", Mapping[str, Any]]:
    """The decoder with a copy of its layers that takes short steps fastest on CPU; it reads unstacked prompts.

    A step is bound by memory there, and XLA copies a layer out of the stack before each use: so each layer has arrays
    of its own. Kernels are transposed: see `Projection`.
    """
    return Decoder(dataclasses.replace(module.config, decoding_layout=True)), {
        name: {**tree, "layers": {str(i): layer for i, layer in enumerate(_laid_out(tree["layers"]))}}
        for name, tree in variables.items()
    }


@jax.jit
def _laid_out(layers: Any) -> list[Any]:
    def transpose(path, leaf):
        # A quantised kernel is not one array, so the path goes on.
        return leaf.swapaxes(-1, -2) if path[-1].key == "kernel" else leaf

    return unstack(jax.tree_util.tree_map_with_path(transpose, layers))


def rotary_angles(positions: Array, config: DecoderConfig) -> Array:
    """Rotation angles [R, S, H/2] in float32 (Su et al. 2021, arXiv 2104.09864)."""
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_scaling is not None:
        frequencies = config.rope_scaling.scale(frequencies)
    return positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)


def rotate(x: Array, angles: Array) -> Array:
    """Turns the pairs (i, i + H/2) of every head of `x` [R, S, N, H] by `angles` [R, S, H/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class SelfAttention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x, prompt, slots, angles, mask, filled, dropout_ids):
        config = self.config
        queries, keys, values = (
            _projection(config, name, heads * config.head_dim, config.attention_bias)(x, dropout_ids).reshape(
                *x.shape[:2], heads, config.head_dim
            )
            for name, heads in (
                ("q_proj", config.num_attention_heads),
                ("k_proj", config.num_key_value_heads),
                ("v_proj", config.num_key_value_heads),
            )
        )
        queries, keys = rotate(queries, angles), rotate(keys, angles)
        if slots is not None:
            new = Slots(keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3))
            slots = new if prompt is None else _put(slots, new, filled)
        if prompt is None:
            mixed = causal_attention(queries, keys, values, mask, config.sliding_window)
        else:
            mixed = cached_attention(queries, [prompt, slots], mask)
        mixed = mixed.reshape(*x.shape[:2], -1)
        return _projection(config, "o_proj", config.hidden_size, config.attention_bias)(mixed, dropout_ids), slots


def _put(slots: Slots, new: Slots, at: Array) -> Slots:
    put = jax.lax.dynamic_update_slice_in_dim
    return Slots(put(slots.keys, new.keys, at, axis=3), put(slots.values, new.values, at, axis=2))


class Mlp(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x, dropout_ids):
        config = self.config
        gate = _projection(config, "gate_proj", config.intermediate_size, config.mlp_bias)(x, dropout_ids)
        up = _projection(config, "up_proj", config.intermediate_size, config.mlp_bias)(x, dropout_ids)
        return _projection(config, "down_proj", config.hidden_size, config.mlp_bias)(nn.silu(gate) * up, dropout_ids)


class DecoderLayer(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x, prompt, slots, angles, mask, filled, dropout_ids):
        config = self.config
        normed = _norm(config, "input_layernorm")(x)
        attention = SelfAttention(config, name="self_attn")
        attended, slots = attention(normed, prompt, slots, angles, mask, filled, dropout_ids)
        x = x + attended
        normed = _norm(config, "post_attention_layernorm")(x)
        return x + Mlp(config, name="mlp")(normed, dropout_ids), slots


class _UnstackedLayers(nn.Module):
    """What `stack_layers` gives, with parameters under the layer's number and slots one by one."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, prompt, slots, *shared):
        kept = []
        for i in range(self.config.num_hidden_layers):
            x, new = DecoderLayer(self.config, name=str(i))(x, prompt[i], slots[i], *shared)
            kept.append(new)
        return x, kept


class Head(nn.Module):
    """Logits in float32, whatever the dtype of the states."""

    vocab_size: int

    @nn.compact
    def __call__(self, hidden):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (hidden.shape[-1], self.vocab_size))
        return float32_matmul(hidden, kernel.astype(hidden.dtype))


class Decoder(nn.Module):
    """tokens -> hidden states; `logits` maps hidden states to the vocabulary."""

    config: DecoderConfig

    def setup(self):
        config = self.config
        self.embed_tokens = nn.Embed(config.vocab_size, config.hidden_size)
        if config.decoding_layout:
            self.layers = _UnstackedLayers(config)
        else:
            self.layers = stack_layers(
                DecoderLayer,
                config.num_hidden_layers,
                config.scan_layers,
                config.remat,
                in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            )(config)
        self.norm = _norm(config, None)
        if not config.tie_word_embeddings:
            self.lm_head = Head(config.vocab_size)

    def __call__(self, tokens: Array, segment_ids: Array, positions: Array, dropout_ids: Array | None = None) -> Array:
        """Hidden states [R, S, D] after the last norm.

        Args:
          tokens, segment_ids, positions: [R, S] int. Segment 0 is padding; a token sees the earlier positions of
            its own segment, which stand in earlier columns.
          dropout_ids: [R, S] int, gives each token its own adapter dropout (needs a "dropout" rng); None: no dropout.
        """
        return self._attend_within(tokens, segment_ids, positions, None, dropout_ids)[0]

    def prefill(self, tokens: Array, lengths: Array) -> tuple[Array, Prompts]:
        """Hidden states [R, S, D] of right-padded prompts (tokens [R, S], lengths [R]), and what goes on from them."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
        hidden, slots = self._attend_within(tokens, segment_ids, positions, (), None)
        return hidden, Prompts(slots, lengths)

    def extend(
        self,
        tokens: Array,
        steps: Array,
        visible: Array,
        prompts: Prompts,
        slots: Slots,
        slot_steps: Array,
        filled: Array,
    ) -> tuple[Array, Slots]:
        """Hidden states [R, Q, D] of tokens that go on from their row's prompt, in as many branches as there are.

        Args:
          tokens: [R, Q] int.
          steps: [Q] int, how many new tokens lie between each and the prompt.
          visible: [R, Q, C] bool, the slots that a token sees: its own, and those of its branch's earlier tokens.
          prompts: what `prefill` returned.
          slots: keys and values of new tokens; those of `tokens` are put in from slot `filled` on.
          slot_steps: [C] int, `steps` of the tokens in the slots.
          filled: [] int, slots in use.
        """
        prompt_slots = jnp.arange(jax.tree.leaves(prompts.slots)[0].shape[-1])  # of keys
        seen = jnp.broadcast_to((prompt_slots < prompts.lengths[:, None])[:, None], (*tokens.shape, len(prompt_slots)))
        positions = prompts.lengths[:, None] + steps
        window = self.config.sliding_window
        if window is not None:
            seen &= positions[:, :, None] - prompt_slots < window
            visible &= steps[:, None] - slot_steps < window
        return self._through_layers(
            tokens, positions, prompts.slots, slots, jnp.concatenate([seen, visible], axis=-1), filled, None
        )

    def _attend_within(self, tokens, segment_ids, positions, slots, dropout_ids):
        window = self.config.sliding_window
        mask = attention_mask(segment_ids, positions, segment_ids, positions, causal=True, window=window)
        return self._through_layers(tokens, positions, None, slots, mask, None, dropout_ids)

    def _through_layers(self, tokens, positions, prompt, slots, mask, filled, dropout_ids):
        angles = rotary_angles(positions, self.config)
        # Rounded after the lookup, so that the table's gradient is summed in the table's own dtype.
        embedded = self.embed_tokens(tokens).astype(self.config.dtype)
        hidden, slots = self.layers(embedded, prompt, slots, angles, mask, filled, dropout_ids)
        return self.norm(hidden), slots

    def logits(self, hidden: Array) -> Array:
        """Next-token logits [..., V] in float32 for hidden states [..., D]."""
        if self.config.tie_word_embeddings:
            return float32_matmul(hidden, self.embed_tokens.embedding.astype(hidden.dtype).T)
        return self.lm_head(hidden)

    def full_logits(self, tokens: Array, segment_ids: Array, positions: Array) -> Array:
        """Logits [R, S, V] at every position: the plain path, for references and initialisation."""
        return self.logits(self(tokens, segment_ids, positions))


def _projection(config: DecoderConfig, name: str, features: int, use_bias: bool) -> Projection:
    lora = config.lora if config.lora is not None and name in config.lora.targets else None
    is_transposed = config.decoding_layout and not config.quantize
    return Projection(features, use_bias, jnp.dtype(config.dtype), lora, config.quantize, is_transposed, name=name)


def _norm(config: DecoderConfig, name: str | None) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=config.rms_norm_eps, dtype=jnp.dtype(config.dtype), name=name)
