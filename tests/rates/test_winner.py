"""The command that a search ends with, as it is read by a shell and by ragjax.train."""

import shlex

import pytest

from ragjax.config import RunConfig
from ragjax.rates.search import winner_flags

WINNER = {"strategy": "two_phase", "winner": {"generator": 3e-5, "embedder": 1e-6}}


def trained(record, config: RunConfig) -> RunConfig:
    """What the printed flags configure."""
    words = shlex.split(" ".join(winner_flags(record, config)))
    return RunConfig(**{name.removeprefix("--"): _value(value) for name, value in (w.split("=", 1) for w in words)})


def _value(text: str):
    try:
        return float(text) if "." in text or "e-" in text else int(text)
    except ValueError:
        return text


def test_all_that_was_searched_with_is_repeated(tmp_path, monkeypatch):
    (tmp_path / "my data").mkdir()
    (tmp_path / "bert").mkdir()
    monkeypatch.chdir(tmp_path)
    config = RunConfig(
        strategy="auto", data="my data", embedder="./bert", generator="mistral-7b", top_k=3, quantize="nf4",
        lora_targets="q_proj,v_proj", run_dir="runs/search", eval_limit=9, dev_limit=100,
    )  # fmt: skip
    assert trained(WINNER, config) == RunConfig(
        strategy="two_phase", data=f"{tmp_path}/my data", embedder=f"{tmp_path}/bert", generator="mistral-7b", top_k=3,
        quantize="nf4", lora_targets="q_proj,v_proj", generator_lr=3e-5, embedder_lr=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("decode", ["none", "concat"])
def test_what_a_strategy_decodes_by_default_needs_no_flag(decode):
    record = {"strategy": "embedder", "winner": {"embedder": 2e-5}}
    config = RunConfig(strategy="embedder", decode=decode)
    assert trained(record, config) == RunConfig(strategy="embedder", decode=decode, embedder_lr=2e-5)
    assert ("--decode=concat" in winner_flags(record, config)) == (decode == "concat")
