"""How parameters are shared out over a mesh: every one is covered, and lies as it was worked out by hand."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from ragjax.errors import UserError
from ragjax.meshes import AXES
from ragjax.parallel import Sharded
from ragjax.weights.sharding import RULES, axes_of
from ragjax.weights.tables import LLAMA, TABLES


def sharded(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Sharded:
    return Sharded(AbstractMesh((data, fsdp, tensor), AXES), axes_of)


@pytest.mark.parametrize("model_type", TABLES)
def test_one_rule_covers_each_parameter_of_each_model(model_type):
    paths = [row.path for row in TABLES[model_type].rows]
    if TABLES[model_type] is LLAMA:
        kernels = [path for path in paths if path.startswith("layers/") and path.endswith("/kernel")]
        paths += [f"{path}/{part}" for path in kernels for part in ("codes", "absmax")]
        paths += [path.replace("kernel", part) for path in kernels for part in ("lora_a", "lora_b")]
    for path in paths:
        for whole in (path, f"optimizer/generator/1/mu/params/{path}"):
            fitting = [pattern for pattern, _ in RULES if re.fullmatch(rf"(.+/)?({pattern})", whole)]
            assert len(fitting) == 1, whole


def test_a_parameter_that_no_rule_covers_is_a_bug():
    with pytest.raises(ValueError, match="no rule says how layers/mlp/router/kernel is shared out"):
        axes_of("layers/mlp/router/kernel")


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("params/layers/self_attn/q_proj/kernel", (2, 32, 16), (None, "fsdp", "tensor")),
        ("params/layers/mlp/down_proj/kernel", (2, 64, 32), (None, "tensor", "fsdp")),
        ("optimizer/generator/1/mu/lora/layers/mlp/down_proj/lora_a", (2, 64, 4), (None, "tensor", None)),
        ("optimizer/generator/1/nu/lora/layers/mlp/up_proj/lora_b", (2, 4, 64), (None, None, "tensor")),
        # One block of 64 inputs has one scale, which stays whole where the codes are cut.
        ("layers/mlp/up_proj/kernel/codes", (2, 64, 32), (None, "fsdp", "tensor")),
        ("layers/mlp/up_proj/kernel/absmax", (2, 1, 32), (None, None, "tensor")),
        ("embedder/params/encoder/layer/output/dense/kernel", (5, 2, 48, 32), (None, None, "fsdp", None)),
        ("embedder/params/embeddings/word_embeddings/embedding", (300, 30), (None, None)),  # 4 does not divide 30
        ("optimizer/embedder/1/count", (5,), (None,)),
        ("step", (), ()),
    ],
)
def test_leaves_lie_as_worked_out_by_hand(path, shape, spec):
    assert tuple(sharded(fsdp=4, tensor=2).sharding(path, shape).spec) == spec


def test_a_width_that_the_tensor_axis_does_not_divide_is_refused():
    shapes = {"layers": {"self_attn": {"k_proj": {"kernel": jax.ShapeDtypeStruct((2, 576, 192), np.float32)}}}}
    sharded(fsdp=5, tensor=3).check(shapes, "smollm2-135m")
    with pytest.raises(UserError) as caught:
        sharded(tensor=5).check(shapes, "smollm2-135m")
    assert str(caught.value) == (
        "--mesh has tensor:5, which does not divide 192, a width of smollm2-135m's layers/self_attn/k_proj/kernel: "
        "choose a divisor of it, or share the weights out over fsdp alone."
    )
