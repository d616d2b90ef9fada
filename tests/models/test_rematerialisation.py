"""What the decoder's layers keep for the backward pass and what they compute again, read off the gradient's program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ragjax.config import QUANTIZE, REMAT
from ragjax.models.decoder import Decoder
from ragjax.models.lora import LoraConfig
from ragjax.models.quantize import quantize
from tests.tiny_modules import DECODER, tiny_decoder

LORA = LoraConfig(rank=3, alpha=6.0)
WIDE, INNER, LAYERS = DECODER["hidden_size"], DECODER["intermediate_size"], DECODER["num_hidden_layers"]
KEYS = DECODER["num_key_value_heads"] * DECODER["head_dim"]
TOKENS = 26  # of two rows: no width of the model, nor a factor of its kernels' sizes
KINDS = pytest.mark.parametrize("kind", [None, *QUANTIZE])


def gradient_of(kind: str | None, remat: str):
    """(loss and gradient of the adapters, the adapters)."""
    module, variables = tiny_decoder(lora=LORA, remat=remat)
    params = variables["params"]
    if kind:
        module = Decoder(dataclasses.replace(module.config, quantize=kind))
        stored = jax.vmap(functools.partial(quantize, kind=kind))
        params = jax.tree.map_with_path(
            lambda path, leaf: stored(leaf) if path[0].key == "layers" and path[-1].key == "kernel" else leaf, params
        )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, DECODER["vocab_size"], (2, TOKENS // 2))
    positions = np.broadcast_to(np.arange(TOKENS // 2), tokens.shape)
    weights = rng.normal(size=(*tokens.shape, WIDE))

    def loss(lora):
        return jnp.sum(weights * module.apply({"params": params, "lora": lora}, tokens, positions * 0 + 1, positions))

    return jax.value_and_grad(loss), variables["lora"]


def equations(jaxpr):
    """All equations, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)  # a closed one holds the program
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def program(kind: str | None, remat: str):
    gradient, lora = gradient_of(kind, remat)
    return list(equations(jax.make_jaxpr(gradient)(lora).jaxpr))


@KINDS
def test_partial_multiplies_with_no_kernel_again(kind):
    """Seven products forward, seven backward; quantised kernels were dequantised and multiplied once more."""
    kernels = [{WIDE, width} for width in (WIDE, INNER, KEYS)]

    def products(remat):
        operands = [
            [set(operand.aval.shape) for operand in equation.invars if operand.aval.ndim == 2]
            for equation in program(kind, remat)
            if equation.primitive.name == "dot_general"
        ]
        return sum(any(shape in kernels for shape in shapes) for shapes in operands)

    assert products("none") == products("partial") == 14
    assert products("full") == 20  # all but down_proj's forward, whose result no gradient needs


@KINDS
def test_partial_keeps_each_linear_layers_output_once(kind):
    """And a layer's input. A base's and its adapter's products apart were twice as much."""
    scan = next(equation for equation in program(kind, "partial") if equation.primitive.name == "scan")
    sizes = [output.aval.size for output in scan.outvars if output.aval.size % TOKENS == 0]
    # down_proj's output is added to the next layer's input, and not looked at again.
    linear = [WIDE, KEYS, KEYS, WIDE, INNER, INNER]
    last = WIDE  # what the last layer gives
    assert sum(sizes) == TOKENS * (last + LAYERS * sum([WIDE, *linear]))


@KINDS
def test_losses_and_gradients_are_those_without_rematerialisation(kind):
    results = {}
    for remat in REMAT:
        gradient, lora = gradient_of(kind, remat)
        results[remat] = jax.jit(gradient)(lora)
    loss, expected = results.pop("none")
    assert all(np.linalg.norm(leaf) > 0 for leaf in jax.tree.leaves(expected))
    for other, found in results.values():
        np.testing.assert_allclose(other, loss, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
