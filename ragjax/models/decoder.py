"""A LLaMA, Mistral or Qwen decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied or untied head.

Touvron et al. 2023, arXiv 2302.13971 and 2307.09288; Jiang et al. 2023, arXiv 2310.06825, for the sliding window;
Grattafiori et al. 2024, arXiv 2407.21783, for Llama 3; Yang et al. 2024, arXiv 2407.10671, and 2025, arXiv 2505.09388,
for Qwen2's biases and Qwen3's norms of queries and keys. Parameter names are Hugging Face's. The model returns hidden
states; whoever needs logits asks `logits` for just the positions it wants.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float, Float32, Int

from ragjax.arrays import AnyArray, Array, Variables
from ragjax.models.attention import attention_mask, cached_attention, causal_attention
from ragjax.models.decoder_config import DecoderConfig
from ragjax.models.layers import Projection, stack_layers
from ragjax.models.products import weight_product
from ragjax.models.rope import rotary_angles, rotate, text_lengths


class Slots(NamedTuple):
    """Keys and values of earlier tokens: of every layer, or of one without the axis L."""

    keys: Float[Array, "L R M H C"]  # as the product with queries reads them
    values: Float[Array, "L R M C H"]


class Prompts(NamedTuple):
    """What R prompts have left in a decoder that goes on from them."""

    slots: Slots | Sequence[Slots]  # the layers' slots one by one for what `for_decoding` gives
    lengths: Int[Array, " R"]  # tokens of each prompt; what lies behind them is padding


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


def for_decoding(module: "Decoder", variables: Variables) -> tuple["Decoder", Variables]:
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


class SelfAttention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R S D"],
        prompt: Slots | None,
        slots: Slots | tuple[()] | None,
        angles: Float[Array, "R S half"],
        mask: Bool[AnyArray, "R S C"],
        filled: Int[AnyArray, ""] | int,
        dropout_ids: Int[AnyArray, "R S"] | None,
    ) -> tuple[Float[Array, "R S D"], Slots | None]:
        config = self.config
        queries, keys, values = (
            _projection(config, name, heads * config.head_dim, config.attention_bias or config.qkv_bias)(
                x, dropout_ids
            ).reshape(*x.shape[:2], heads, config.head_dim)
            for name, heads in (
                ("q_proj", config.num_attention_heads),
                ("k_proj", config.num_key_value_heads),
                ("v_proj", config.num_key_value_heads),
            )
        )
        if config.qk_norm:
            queries, keys = _norm(config, "q_norm")(queries), _norm(config, "k_norm")(keys)
        queries, keys = (rotate(x, angles, config.rope_scaling) for x in (queries, keys))
        new = Slots(keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3))
        if prompt is not None and isinstance(slots, Slots):
            kept = _put(slots, new, filled)
            mixed = cached_attention(queries, [prompt, kept], mask)
        else:
            kept = None if slots is None else new
            mixed = causal_attention(queries, keys, values, mask, config.sliding_window)
        mixed = mixed.reshape(*x.shape[:2], -1)
        return _projection(config, "o_proj", config.hidden_size, config.attention_bias)(mixed, dropout_ids), kept


def _put(slots: Slots, new: Slots, at: Int[AnyArray, ""] | int) -> Slots:
    put = jax.lax.dynamic_update_slice_in_dim
    return Slots(put(slots.keys, new.keys, at, axis=3), put(slots.values, new.values, at, axis=2))


class Mlp(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "R S D"], dropout_ids: Int[AnyArray, "R S"] | None) -> Float[Array, "R S D"]:
        config = self.config
        gate = _projection(config, "gate_proj", config.intermediate_size, config.mlp_bias)(x, dropout_ids)
        up = _projection(config, "up_proj", config.intermediate_size, config.mlp_bias)(x, dropout_ids)
        return _projection(config, "down_proj", config.hidden_size, config.mlp_bias)(nn.silu(gate) * up, dropout_ids)


class DecoderLayer(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R S D"],
        prompt: Slots | None,
        slots: Slots | tuple[()] | None,
        angles: Float[Array, "R S half"],
        mask: Bool[AnyArray, "R S C"],
        filled: Int[AnyArray, ""] | int,
        dropout_ids: Int[AnyArray, "R S"] | None,
    ) -> tuple[Float[Array, "R S D"], Slots | None]:
        config = self.config
        normed = _norm(config, "input_layernorm")(x)
        attention = SelfAttention(config, name="self_attn")
        attended, kept = attention(normed, prompt, slots, angles, mask, filled, dropout_ids)
        x = x + attended
        normed = _norm(config, "post_attention_layernorm")(x)
        return x + Mlp(config, name="mlp")(normed, dropout_ids), kept


class _UnstackedLayers(nn.Module):
    """What `stack_layers` gives, with parameters under the layer's number and slots one by one."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "R S D"], prompt: Sequence[Slots], slots: Sequence[Slots], *shared: Any
    ) -> tuple[Float[Array, "R S D"], list[Slots | None]]:
        kept = []
        for i in range(self.config.num_hidden_layers):
            x, new = DecoderLayer(self.config, name=str(i))(x, prompt[i], slots[i], *shared)
            kept.append(new)
        return x, kept


class Head(nn.Module):
    """Logits in float32, whatever the dtype of the states."""

    vocab_size: int

    @nn.compact
    def __call__(self, hidden: Float[AnyArray, "*rows D"]) -> Float32[Array, "*rows V"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (hidden.shape[-1], self.vocab_size))
        return weight_product(hidden, kernel, wide=True)


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

    def __call__(
        self,
        tokens: Int[AnyArray, "R S"],
        segment_ids: Int[AnyArray, "R S"],
        positions: Int[AnyArray, "R S"],
        dropout_ids: Int[AnyArray, "R S"] | None = None,
    ) -> Float[Array, "R S D"]:
        """Hidden states after the last norm.

        Args:
          tokens, segment_ids, positions: segment 0 is padding; a token sees the earlier positions of
            its own segment, which stand in earlier columns.
          dropout_ids: gives each token its own adapter dropout (needs a "dropout" rng); None: no dropout.
        """
        return self._attend_within(tokens, segment_ids, positions, None, dropout_ids)[0]

    def prefill(
        self, tokens: Int[AnyArray, "R S"], lengths: Int[AnyArray, " R"]
    ) -> tuple[Float[Array, "R S D"], Prompts]:
        """Hidden states of right-padded prompts, and what goes on from them."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
        hidden, slots = self._attend_within(tokens, segment_ids, positions, (), None)
        return hidden, Prompts(slots, jnp.asarray(lengths))

    def extend(
        self,
        tokens: Int[AnyArray, "R Q"],
        steps: Int[AnyArray, " Q"],
        visible: Bool[AnyArray, "R Q C"],
        prompts: Prompts,
        slots: Slots | Sequence[Slots],
        slot_steps: Int[AnyArray, " C"],
        filled: Int[AnyArray, ""] | int,
    ) -> tuple[Float[Array, "R Q D"], Slots | Sequence[Slots]]:
        """Hidden states of tokens that go on from their row's prompt, in as many branches as there are.

        Args:
          tokens: the new ones.
          steps: how many new tokens lie between each and the prompt.
          visible: the slots that a token sees: its own, and those of its branch's earlier tokens.
          prompts: what `prefill` returned.
          slots: keys and values of new tokens; those of `tokens` are put in from slot `filled` on.
          slot_steps: `steps` of the tokens in the slots.
          filled: slots in use.
        """
        prompt_slots = jnp.arange(jax.tree.leaves(prompts.slots)[0].shape[-1])  # of keys
        seen = jnp.broadcast_to((prompt_slots < prompts.lengths[:, None])[:, None], (*tokens.shape, len(prompt_slots)))
        positions = prompts.lengths[:, None] + steps
        window = self.config.sliding_window
        if window is not None:
            seen &= positions[:, :, None] - prompt_slots < window
            visible = visible & (steps[:, None] - slot_steps < window)
        return self._through_layers(
            tokens,
            positions,
            positions + 1,
            prompts.slots,
            slots,
            jnp.concatenate([seen, visible], axis=-1),
            filled,
            None,
        )

    def _attend_within(self, tokens, segment_ids, positions, slots, dropout_ids):
        window = self.config.sliding_window
        mask = attention_mask(segment_ids, positions, segment_ids, positions, causal=True, window=window)
        lengths = text_lengths(segment_ids, positions)
        return self._through_layers(tokens, positions, lengths, None, slots, mask, 0, dropout_ids)

    def _through_layers(self, tokens, positions, lengths, prompt, slots, mask, filled, dropout_ids):
        config = self.config
        angles = rotary_angles(positions, lengths, config.rope_theta, config.head_dim, config.rope_scaling)
        # Rounded after the lookup, so that the table's gradient is summed in the table's own dtype.
        embedded = self.embed_tokens(tokens).astype(config.dtype)
        hidden, slots = self.layers(embedded, prompt, slots, angles, mask, filled, dropout_ids)
        return self.norm(hidden), slots

    def logits(self, hidden: Float[AnyArray, "*rows D"]) -> Float32[Array, "*rows V"]:
        """Next-token logits for hidden states."""
        if self.config.tie_word_embeddings:
            return weight_product(hidden, self.embed_tokens.embedding.T, wide=True)
        return self.lm_head(hidden)

    def full_logits(
        self, tokens: Int[AnyArray, "R S"], segment_ids: Int[AnyArray, "R S"], positions: Int[AnyArray, "R S"]
    ) -> Float32[Array, "R S V"]:
        """Logits at every position: the plain path, for references and initialisation."""
        return self.logits(self(tokens, segment_ids, positions))


def _projection(config: DecoderConfig, name: str, features: int, use_bias: bool) -> Projection:
    lora = config.lora if config.lora is not None and name in config.lora.targets else None
    is_transposed = config.decoding_layout and not config.quantize
    return Projection(features, use_bias, jnp.dtype(config.dtype), lora, config.quantize, is_transposed, name=name)


def _norm(config: DecoderConfig, name: str | None) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=config.rms_norm_eps, dtype=jnp.dtype(config.dtype), name=name)
