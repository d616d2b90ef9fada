"""What a configuration may hold: lists are tidied, and what cannot be meant is refused in one sentence."""

import dataclasses
import math
import re

import jax
import pytest

from ragjax.config import LORA_TARGETS, DecodeConfig, EvaluateConfig, RunConfig, SearchConfig
from ragjax.errors import UserError
from ragjax.models.lora import LoraConfig
from ragjax.pretrained import load_generator
from tests.tiny import write_tiny_llama

CONFIGS = (RunConfig, DecodeConfig, SearchConfig, EvaluateConfig)


def test_blanks_in_a_list_name_the_same_projections():
    config = RunConfig(lora_targets=" q_proj, k_proj ,q_proj")
    assert config.lora_target_names == ("q_proj", "k_proj")
    assert config == RunConfig(lora_targets="q_proj,k_proj")  # a run's flags are compared with another's


def test_lists_of_numbers_and_decoders_are_stripped():
    config = EvaluateConfig(top_k="1, 5 ,10", decode="concat, rag_token")
    assert config.numbers_of_passages == [1, 5, 10]
    assert config.decoders == ["concat", "rag_token"]
    assert (EvaluateConfig().numbers_of_passages, EvaluateConfig().decoders) == ([], [])
    assert SearchConfig(embedder_rates="1e-5, 1e-6,1e-05").rates("embedder") == [1e-6, 1e-5]


@pytest.mark.parametrize(
    ("config", "value", "sentence"),
    [
        (
            RunConfig,
            {"lora_targets": "q_proj,kproj"},
            "--lora_targets=kproj is not known: choose from q_proj, k_proj, ",
        ),
        (RunConfig, {"lora_targets": ""}, "--lora_targets= is not known: choose from q_proj, "),
        (RunConfig, {"lora_targets": "q_proj,"}, "--lora_targets= is not known: choose from q_proj, "),
        (RunConfig, {"lora_targets": "q_proj k_proj"}, "--lora_targets=q_proj k_proj is not known: choose from "),
        (RunConfig, {"max_grad_norm": 0.0}, "--max_grad_norm=0 is out of range: give a number above 0."),
        (RunConfig, {"max_grad_norm": math.inf}, "--max_grad_norm=inf is out of range: give a number above 0."),
        (RunConfig, {"weight_decay": math.nan}, "--weight_decay=nan is out of range: give a number at least 0."),
        (RunConfig, {"embedder_lr": 0.0}, "--embedder_lr=0 is out of range: give a number above 0."),
        (RunConfig, {"generator_lr": -1e-4}, "--generator_lr=-0.0001 is out of range: give a number above 0."),
        (RunConfig, {"score_scale": 0.0}, "--score_scale=0 is out of range: give a number above 0."),
        (RunConfig, {"ranking_scale": 0.0}, "--ranking_scale=0 is out of range: give a number above 0."),
        (RunConfig, {"lora_alpha": 0.0}, "--lora_alpha=0 is out of range: give a number above 0."),
        (RunConfig, {"lora_dropout": 1.0}, "--lora_dropout=1 is out of range: give a number at least 0 and below 1."),
        (RunConfig, {"warmup_fraction": 5.0}, "--warmup_fraction=5 is out of range: give a number at least 0 and at "),
        (RunConfig, {"retriever_temperature": 0.0}, "--retriever_temperature=0 is out of range: give a number above"),
        (RunConfig, {"batch_size": 0}, "--batch_size=0 is out of range: give a number at least 1."),
        (RunConfig, {"objective": "rag"}, "--objective=rag is not known: choose from rag_token, rag_sequence, "),
        (DecodeConfig, {"top_p": 0.0}, "--top_p=0 is out of range: give a number above 0 and at most 1."),
        (DecodeConfig, {"temperature": math.inf}, "--temperature=inf is out of range: give a number at least 0."),
        (EvaluateConfig, {"top_k": "1,,5"}, "--top_k=1,,5 is no list of positive numbers: write it as 1,5,10."),
        (EvaluateConfig, {"top_k": "2.5"}, "--top_k=2.5 is no list of positive numbers: write it as 1,5,10."),
        (EvaluateConfig, {"decode": "concat;rag_token"}, "--decode=concat;rag_token is not known: choose from concat"),
        (EvaluateConfig, {"eval_limit": -1}, "--eval_limit=-1 is out of range: give a number at least 0."),
        (SearchConfig, {"embedder_rates": "1e-6,inf"}, "--embedder_rates=1e-6,inf is no list of positive numbers: "),
        (SearchConfig, {"generator_rates": ""}, "--generator_rates= is no list of positive numbers: write it as 1e-6"),
        (
            SearchConfig,
            {"select": "recall"},
            "--select=recall is not known: choose from f1, em, recall_at_5, dev_loss.",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(config, value, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        config(**value)
    with pytest.raises(UserError, match=re.escape(sentence)):
        dataclasses.replace(config(), **value)


def test_every_number_has_a_lower_bound_and_every_default_is_within_its_own():
    numbers = [
        field for config in CONFIGS for field in dataclasses.fields(config) if field.metadata["kind"] in (int, float)
    ]
    assert len(numbers) > 30
    for field in numbers:
        bounds = field.metadata["range"]
        assert bounds.minimum is not None or bounds.above is not None, field.name
        assert math.nan not in bounds, field.name
    for config in CONFIGS:
        config()  # raises nothing


def test_the_names_of_projections_are_those_of_the_decoder(tmp_path):
    """Each target gets an adapter, and there is no projection beside them."""
    generator = load_generator(write_tiny_llama(tmp_path), lora=LoraConfig(rank=2, targets=LORA_TARGETS))
    layers = generator.params["layers"]
    paths, _ = jax.tree_util.tree_flatten_with_path(layers)
    found = {path[-2].key for path, _ in paths if path[-1].key == "kernel"}
    assert found == set(LORA_TARGETS)
