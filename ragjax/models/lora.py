"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), kept in a variable collection of their own.

A model's base weights live in the collection "params" and its adapters in "lora". Training an adapter is
differentiating the second collection while the first is a plain argument, so no gradient of a base weight is ever
formed. A model without adapters simply has no "lora" collection.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, Int, Key

from ragjax.arrays import AnyArray, Array, Tree
from ragjax.config import LORA_TARGETS
from ragjax.models.products import weight_product

COLLECTION = "lora"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which projections carry an adapter, and its shape: y = x W + (alpha / rank) * dropout(x) A B."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LORA_TARGETS


def lora_delta(
    module: nn.Module,
    x: Float[AnyArray, "R S width"],
    features: int,
    config: LoraConfig,
    dropout_ids: Int[AnyArray, "R S"] | None,
) -> Float[Array, "tokens features"]:
    """The adapter's addition to one projection; declares `lora_a` [in, r] and `lora_b` [r, out] on `module`.

    Args:
      module: the projection, inside its compact method.
      x: the projection's input.
      features: the projection's output width.
      config: rank, alpha, dropout.
      dropout_ids: what tells one token's dropout from another's; None: no dropout.

    Returns:
      [R * S, out] in the dtype of `x`.
    """
    width = x.shape[-1]

    def init_a():
        # U(-1/sqrt(in), 1/sqrt(in)), as the reference implementation has it; B = 0 starts at the base model.
        return jax.random.uniform(module.make_rng("params"), (width, config.rank), minval=-1, maxval=1) * width**-0.5

    lora_a = module.variable(COLLECTION, "lora_a", init_a).value
    lora_b = module.variable(COLLECTION, "lora_b", lambda: jnp.zeros((config.rank, features))).value
    if config.dropout > 0.0 and dropout_ids is not None:
        x = _token_dropout(x, module.make_rng("dropout"), dropout_ids, config.dropout)
    hidden = weight_product(x.reshape(-1, width), lora_a)
    # Scaled where it is narrow: on [.., out] the product would be one more pass over memory.
    return weight_product(hidden * jnp.asarray(config.alpha / config.rank, x.dtype), lora_b)


def _token_dropout(
    x: Float[AnyArray, "R S width"], key: Key[Array, ""], dropout_ids: Int[AnyArray, "R S"], rate: float
) -> Float[Array, "R S width"]:
    """Dropout whose pattern depends on the token's own id, never on where in a batch or on which device it lies."""

    def keep_features(token_id):
        return jax.random.bernoulli(jax.random.fold_in(key, token_id), 1.0 - rate, x.shape[-1:])

    keep = jax.vmap(jax.vmap(keep_features))(dropout_ids)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def is_fresh(adapters: Tree) -> bool:
    """Whether adapters leave their model as it is: every B is zero, as before training (Hu et al. 2021)."""
    leaves = jax.tree_util.tree_leaves_with_path(adapters)
    return not any(bool(jnp.any(leaf)) for path, leaf in leaves if path[-1].key == "lora_b")
