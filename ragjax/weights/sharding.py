"""Which axis of a mesh shares out which dimension of a parameter: data, by the parameter's path in our trees.

A rule names the axes of a leaf's last dimensions; those in front (layers, copies in a learning-rate search) stay whole.
The first rule whose pattern is the end of a path holds, so what belongs to a parameter follows it: the codes and scales
of a quantised kernel, and the moments in an optimizer's state. Adapters have rows of their own: A has the kernel's
inputs, B its outputs.

Notable choices
- In a decoder the tensor axis cuts what a layer widens to (heads, the feed-forward width), so that a layer meets the
  other devices of its group twice: after o_proj and after down_proj. The vocabulary is cut too.
- The encoders are small: they are shared out over fsdp alone, and the devices of a tensor axis compute the same.
- Norms and biases of a residual stream are too small to cut.
"""

import functools
import re

from ragjax.meshes import FSDP, TENSOR

_WIDENING = r"(q|k|v|gate|up)_proj"
_NARROWING = r"(o|down)_proj"
_KERNEL = r"kernel(/codes|/absmax)?"

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Decoders.
    (r"embed_tokens/embedding", (TENSOR, FSDP)),
    (rf"{_WIDENING}/{_KERNEL}", (FSDP, TENSOR)),
    (rf"{_WIDENING}/bias", (TENSOR,)),
    (rf"{_WIDENING}/lora_a", (FSDP, None)),
    (rf"{_WIDENING}/lora_b", (None, TENSOR)),
    (rf"{_NARROWING}/{_KERNEL}", (TENSOR, FSDP)),
    (rf"{_NARROWING}/bias", (None,)),
    (rf"{_NARROWING}/lora_a", (TENSOR, None)),
    (rf"{_NARROWING}/lora_b", (None, FSDP)),
    (r"(input_layernorm|post_attention_layernorm|q_norm|k_norm|norm)/scale", (None,)),
    (r"lm_head/kernel", (FSDP, TENSOR)),
    # Encoders.
    (r"(word|position|token_type)_embeddings/embedding", (None, FSDP)),
    (r"relative_attention_bias/embedding", (None, None)),
    (r"(query|key|value|dense|q|k|v|o)/kernel", (FSDP, None)),
    (r"(query|key|value|dense|q|k|v|o)/bias", (None,)),
    (r"LayerNorm/(scale|bias)", (None,)),
    # Of a training state.
    (r"step|count|learning_rates/(embedder|generator)", ()),
)


@functools.cache
def axes_of(path: str) -> tuple[str | None, ...]:
    """The axes that share out the last dimensions of the leaf at a path, None for a dimension that stays whole.

    Raises ValueError for a leaf that no rule covers, which is a bug.
    """
    for pattern, axes in RULES:
        if re.fullmatch(rf"(.+/)?({pattern})", path):
            return axes
    raise ValueError(f"no rule says how {path} is shared out over a mesh: add one to weights/sharding.py")
