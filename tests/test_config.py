"""What a configuration may hold: lists are tidied, and what cannot be meant is refused in one sentence."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from ragjax.config import (
    LORA_TARGETS,
    PAPER_RATES,
    DecodeConfig,
    EvaluateConfig,
    ProcessConfig,
    RunConfig,
    SearchConfig,
    Strategy,
)
from ragjax.errors import UserError
from ragjax.fields import differing_fields
from ragjax.models.lora import LoraConfig
from ragjax.pretrained import load_generator
from ragjax.training import STRATEGIES
from tests.tiny import write_tiny_llama

CONFIGS = (RunConfig, DecodeConfig, SearchConfig, EvaluateConfig, ProcessConfig)


def test_blanks_in_a_list_name_the_same_projections():
    config = RunConfig(lora_targets=" q_proj, k_proj ,q_proj")
    assert config.lora_targets == ("q_proj", "k_proj")
    assert config == RunConfig(lora_targets="q_proj,k_proj")  # a run's flags are compared with another's


@pytest.mark.parametrize(
    "given", ["2, 5,2 ", [2, 5], (2, 5, 5), ["2", "5"], range(2, 8, 3), np.array([2, 5]), [2.0, 5], iter([2, 5])]
)
def test_a_tuple_may_be_given_in_any_form(given):
    """As text from a flag, and as what is at hand in Python; it is held as a tuple of the kind."""
    config = EvaluateConfig(top_k=given)
    assert config.top_k == (2, 5)
    assert {type(k) for k in config.top_k} == {int}


def test_tuples_of_numbers_and_names():
    config = EvaluateConfig(top_k=5, decode="concat, rag_token")
    assert (config.top_k, config.decode) == ((5,), ("concat", "rag_token"))
    for nothing in ("", [], ()):
        assert (EvaluateConfig(top_k=nothing).top_k, EvaluateConfig(decode=nothing).decode) == ((), ())
    config = SearchConfig(embedder_rates="1e-5, 1e-6,1e-05")
    assert config.embedder_rates == (1e-5, 1e-6)
    assert config.rates("embedder") == [1e-6, 1e-5]
    assert SearchConfig().rates("generator") == list(PAPER_RATES)


def test_values_of_like_kinds_are_taken():
    config = RunConfig(data=Path("a") / "b", score_scale=2, top_k=np.int64(3), embedder_lr=None)
    assert (config.data, config.score_scale, config.top_k, config.embedder_lr) == ("a/b", 2.0, 3, None)
    assert type(config.top_k) is int


def test_recorded_fields_are_compared_as_they_are_meant():
    """Lists of a config.json, the text of an older one, and what an older one does not have."""
    config = RunConfig(lora_targets=["q_proj", "v_proj"])
    recorded = json.loads(json.dumps(dataclasses.asdict(config)))
    assert recorded["lora_targets"] == ["q_proj", "v_proj"]
    assert differing_fields(recorded, config) == []
    assert differing_fields(recorded | {"lora_targets": "q_proj,v_proj"}, config) == []
    assert differing_fields(recorded | {"lora_targets": "q_proj"}, config) == ["lora_targets"]
    del recorded["seed"]  # what was not known yet was as it is by default
    assert differing_fields(recorded | {"top_k": 4}, config) == ["top_k"]
    assert differing_fields(recorded, dataclasses.replace(config, seed=7)) == ["seed"]
    rates = SearchConfig(embedder_rates="1e-7")
    assert differing_fields({**dataclasses.asdict(rates), "embedder_rates": "1e-07"}, rates) == []
    assert differing_fields({**dataclasses.asdict(rates), "embedder_rates": "slow"}, rates) == ["embedder_rates"]


def test_the_names_of_strategies_stand_once():
    assert {*STRATEGIES, Strategy.AUTO} == set(Strategy)
    assert RunConfig(strategy=Strategy.TWO_PHASE) == RunConfig(strategy="two_phase")
    with pytest.raises(UserError, match=", ".join(Strategy)):
        RunConfig(strategy="all")


@pytest.mark.parametrize(
    ("config", "value", "sentence"),
    [
        (
            RunConfig,
            {"lora_targets": "q_proj,kproj"},
            "--lora_targets=kproj is not known: choose from q_proj, k_proj, ",
        ),
        (RunConfig, {"lora_targets": ""}, "--lora_targets= is not known: choose from q_proj, "),
        (RunConfig, {"lora_targets": "q_proj,"}, "--lora_targets=q_proj, has an empty entry: remove the comma that is"),
        (RunConfig, {"lora_targets": ["q_proj", ""]}, "--lora_targets=q_proj, has an empty entry: remove the comma"),
        (RunConfig, {"lora_targets": "q_proj,,k_proj"}, "--lora_targets=q_proj,,k_proj has an empty entry: remove"),
        (EvaluateConfig, {"decode": "concat, ,none"}, "--decode=concat, ,none has an empty entry: remove the comma"),
        (EvaluateConfig, {"top_k": ",5"}, "--top_k=,5 has an empty entry: remove the comma"),
        (SearchConfig, {"embedder_rates": "1e-6,"}, "--embedder_rates=1e-6, has an empty entry: remove the comma"),
        (RunConfig, {"lora_targets": "q_proj k_proj"}, "--lora_targets=q_proj k_proj is not known: choose from "),
        (RunConfig, {"lora_targets": []}, "--lora_targets= is not known: choose from q_proj, "),
        (RunConfig, {"top_k": 2.5}, "top_k=2.5 is not a whole number: give one such as 5, or leave it out."),
        (RunConfig, {"top_k": True}, "top_k=True is not a whole number: give one such as 5"),
        (RunConfig, {"top_k": "5"}, "top_k='5' is not a whole number: give one such as 5"),
        (RunConfig, {"top_k": None}, "top_k=None is not a whole number: give one such as 5"),
        (RunConfig, {"embedder_lr": "1e-6"}, "embedder_lr='1e-6' is not a number: give one such as 0.5"),
        (RunConfig, {"scan_layers": "no"}, "scan_layers='no' is not True or False: give one of the two"),
        (RunConfig, {"data": 7}, "data=7 is not text: put it in quotes"),
        (
            RunConfig,
            {"decode": None},
            "decode=None is not text: choose from concat, rag_token, rag_sequence, none, or leave it out.",
        ),
        (DecodeConfig, {"decode": "none"}, "--decode=none is not known: choose from concat, rag_token, rag_sequence."),
        (EvaluateConfig, {"top_k": [1, 2.5]}, "--top_k=1,2.5 is not a list of positive numbers: write it as 1,5,10."),
        (EvaluateConfig, {"top_k": math.inf}, "--top_k=inf is not a list of positive numbers: write it as 1,5,10."),
        (EvaluateConfig, {"top_k": [None]}, "--top_k=None is not a list of positive numbers: write it as 1,5,10."),
        (EvaluateConfig, {"decode": ["concat", 7]}, "--decode=7 is not known: choose from concat, rag_token, "),
        (SearchConfig, {"embedder_rates": [1e-6, 0]}, "--embedder_rates=1e-06,0 is not a list of positive numbers: "),
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
        (EvaluateConfig, {"top_k": "1,,5"}, "--top_k=1,,5 has an empty entry: remove the comma that is too many."),
        (EvaluateConfig, {"top_k": "2.5"}, "--top_k=2.5 is not a list of positive numbers: write it as 1,5,10."),
        (EvaluateConfig, {"decode": "concat;rag_token"}, "--decode=concat;rag_token is not known: choose from concat"),
        (EvaluateConfig, {"eval_limit": -1}, "--eval_limit=-1 is out of range: give a number at least 0."),
        (SearchConfig, {"embedder_rates": "1e-6,inf"}, "--embedder_rates=1e-6,inf is not a list of positive numbers: "),
        (
            SearchConfig,
            {"generator_rates": ""},
            "--generator_rates= is not a list of positive numbers: write it as 1e-6",
        ),
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


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"num_processes": 2}, "--num_processes and --process_id go with --coordinator_address=HOST:PORT"),
        ({"coordinator_address": "auto", "process_id": 0}, "--num_processes and --process_id go with"),
        (
            {"coordinator_address": "host0"},
            "--coordinator_address=host0 is no HOST:PORT such as host:8476",
        ),
        ({"coordinator_address": ":8476"}, "--coordinator_address=:8476 is no HOST:PORT"),
        ({"coordinator_address": "host0:http"}, "--coordinator_address=host0:http is no HOST:PORT"),
        ({"coordinator_address": "h:1", "num_processes": 2}, "needs --num_processes and --process_id, too."),
        (
            {"coordinator_address": "h:1", "num_processes": 2, "process_id": 2},
            "--process_id=2 is not one of 2 processes: give 0 to 1.",
        ),
    ],
)
def test_flags_of_several_processes_go_together(values, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        ProcessConfig(**values)
    ProcessConfig()
    ProcessConfig(coordinator_address="auto")
    ProcessConfig(coordinator_address="[::1]:8476", num_processes=2, process_id=1)
