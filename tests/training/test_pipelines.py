"""Both encoders with both decoders, under both losses and every strategy, with adapters, over a quantised base and with
all weights.

The loss before the first step is worked out again from the public faces (vectors, answer log-probabilities of whole
prompts) by plain enumeration in float64; then training has to move what it should and nothing else.
"""

import itertools
import math

import numpy as np
import pytest

from ragjax import load_embedder, load_generator
from ragjax.data.dataset import load_dataset
from ragjax.data.prompts import prompt_text
from ragjax.pipeline import load_models
from ragjax.runs import open_run
from ragjax.training import train
from ragjax.training.strategies import STRATEGIES
from tests.tiny import write_tiny_llama, write_tiny_mpnet
from tests.tiny_runs import changed, flat, read_lines, tiny_world

pytestmark = pytest.mark.slow

WINDOW = 40
LORA, NF4, INT8, FULL = {}, {"quantize": "nf4"}, {"quantize": "int8"}, {"lora_rank": 0}
# test_run.py has BERT with LLaMA, adapters and all weights.
CASES = [
    ("bert", "llama", "rag_sequence", NF4),
    ("bert", "mistral", "rag_token", INT8),
    ("mpnet", "llama", "rag_token", FULL),
    ("mpnet", "mistral", "rag_sequence", LORA),
]
# All pipelines are trained jointly; of the other strategies each has one, because every run compiles for seconds.
OTHERS = list(zip(CASES, ("generator", "independent", "two_phase", "embedder"), strict=True))
MOVES = {
    "embedder": {"embedder"},
    "generator": {"generator"},
    "independent": {"embedder", "generator"},
    "two_phase": {"embedder", "generator"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_world(tmp_path_factory) as world:
        write_tiny_mpnet(world.folder / "mpnet")
        fields = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": WINDOW}
        write_tiny_llama(world.folder / "mistral", seed=3, **fields)
        yield world


@pytest.mark.parametrize(("embedder", "generator", "objective", "how"), CASES, ids=str)
def test_a_pipeline_trains(world, tmp_path, embedder, generator, objective, how):
    models = {"embedder": str(world.folder / embedder), "generator": str(world.folder / generator)}
    config = world.config(tmp_path / "run", objective=objective, max_steps=1, eval_limit=1, **models, **how)
    summary = train(config)
    assert summary.objective == objective
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[0]["dev_nll_per_answer"] == pytest.approx(enumerated_loss(config), rel=1e-5)
    assert_moved(config, {"embedder", "generator"})


@pytest.mark.parametrize(("case", "strategy"), OTHERS, ids=str)
def test_every_other_strategy_trains_a_pipeline(world, tmp_path, case, strategy):
    embedder, generator, objective, how = case
    models = {"embedder": str(world.folder / embedder), "generator": str(world.folder / generator)}
    changes = {"objective": objective, "max_steps": 1, "eval_limit": 1, "dev_every": 0, **models, **how}
    config = world.config(tmp_path / "run", strategy=strategy, **changes)
    assert train(config).strategy == strategy
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["phase"] for line in lines] == [phase.name for phase in STRATEGIES[strategy]]
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in lines)
    assert_moved(config, MOVES[strategy])


def assert_moved(config, trained: set[str]):
    """The trained models moved as a whole, the others not at all."""
    before, after = load_models(config), open_run(config.run_dir).pipeline
    moved = changed(before[0].params, after.embedder.params)
    if "embedder" in trained:
        assert {path for path in flat(before[0].params) if path.endswith("kernel")} <= moved
    else:
        assert moved == set()
    moved = changed(before[1].variables, after.generator.variables)
    if "generator" not in trained:
        assert moved == set()
    elif config.lora_rank:
        assert moved >= {path for path in flat(before[1].variables) if path.endswith("lora_b")}
        assert not any(path.startswith("params/") for path in moved)
    else:
        assert moved == set(flat(before[1].variables))


def enumerated_loss(config) -> float:
    """Mean over the dev questions of -log of the mixture, K answers scored one by one."""
    dataset = load_dataset(config.data)
    questions = dataset.dev[: config.dev_limit]
    embedder = load_embedder(config.embedder)
    generator = load_generator(config.generator, quantize=None if config.quantize == "none" else config.quantize)
    vectors = embedder.encode_passages([passage.embedder_text for passage in dataset.passages]).astype(np.float64)
    losses = []
    for question in questions:
        scores = vectors @ embedder.encode_queries([question.question])[0].astype(np.float64)
        best = np.argsort(-scores)[: config.top_k]
        shares = np.exp(config.score_scale * (scores[best] - scores[best].max()))
        shares /= shares.sum()
        prompts = [prompt_text([dataset.passages[row]], question.question) for row in best]
        if generator.config.sliding_window:
            assert min(len(generator.prompt_ids(prompt)) for prompt in prompts) > WINDOW
        tokens = np.exp(np.float64(generator.answer_log_probs(prompts, [question.answers[0]] * len(best))))  # [K, T]
        if config.objective == "rag_sequence":
            losses.append(-math.log(sum(share * math.prod(row) for share, row in zip(shares, tokens, strict=True))))
        else:
            losses.append(-sum(math.log(shares @ column) for column in tokens.T))
    return float(np.mean(losses))


def test_the_cases_cover_every_pair():
    """Encoder with decoder, encoder with loss, decoder with loss; and every strategy that trains."""
    assert {strategy for _, strategy in OTHERS} == set(MOVES) == set(STRATEGIES) - {"joint", "none"}
    for one, other in ((0, 1), (0, 2), (1, 2)):
        pairs = {(case[one], case[other]) for case in CASES}
        assert pairs == set(itertools.product({p[0] for p in pairs}, {p[1] for p in pairs}))
