"""What is compared between 1 and 8 devices: objective, reduction, and which parameters are trained."""

from typing import Any

from ragjax.data.batches import Example
from ragjax.models.lora import LoraConfig
from ragjax.training.objectives import Objective
from tests.tiny_modules import random_examples, tiny_objective

CASES: dict[str, dict[str, Any]] = {
    # Dropout is on: its pattern belongs to the token, not to the device.
    "rag_token": {"reduction": "sum", "lora": LoraConfig(rank=3, alpha=6.0, dropout=0.3)},
    "rag_token_mean": {"reduction": "mean", "lora": LoraConfig(rank=3, alpha=6.0)},
    "rag_sequence": {"reduction": "sum", "lora": None},
    "concat_nll": {"reduction": "mean", "lora": LoraConfig(rank=3, alpha=6.0)},
}


def objective_of(case: str) -> tuple[Objective, dict[str, Any]]:
    lora = CASES[case]["lora"]
    return tiny_objective(case.removesuffix("_mean"), dropout=lora is not None and lora.dropout > 0, lora=lora)


def examples_of(case: str, seed: int) -> list[Example]:
    return random_examples(5, seed, passages=1 if case == "concat_nll" else 3)


def split(case: str, variables: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen): the embedder where it has a gradient, and the adapter or else the whole generator."""
    embedder, generator = variables["embedder"], variables["generator"]
    trained = {name: tree for name, tree in generator.items() if name == "lora" or CASES[case]["lora"] is None}
    frozen = {"generator": {name: tree for name, tree in generator.items() if name not in trained}}
    if case == "concat_nll":
        return {"generator": trained}, frozen | {"embedder": embedder}
    return {"embedder": embedder, "generator": trained}, frozen
