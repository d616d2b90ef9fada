"""What runs on a GPU or TPU, lowered for both from wherever the tests run: every operation exists there, and every
product of float32 numbers asks for full precision.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from ragjax.data.batches import Shape
from ragjax.generation import beam_search
from ragjax.models.bert import Bert, BertConfig
from ragjax.models.decoder import Decoder
from ragjax.models.decoder_config import DecoderConfig
from ragjax.models.encoders import sentence_vectors
from ragjax.models.lora import LoraConfig
from ragjax.models.mpnet import MPNet, MPNetConfig
from ragjax.parallel import ONE_DEVICE
from ragjax.retrieval import ArrayVectors
from ragjax.retrieval.device_index import place_vectors, search_on_device
from ragjax.training.objectives import AnswerMixture, AnswerObjective, ConcatenatedObjective
from ragjax.training.state import init_state, make_optimizer
from ragjax.training.step import make_eval_step, make_train_step
from tests.tiny_modules import BERT, DECODER, MPNET, random_examples, stacked_batch

PLATFORMS = ["cuda", "tpu"]
SHAPE = Shape(15, 64, 8)
RATES = {"embedder": 1e-5, "generator": 1e-4}
DECODERS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "tied": {"tie_word_embeddings": True},
    "tied bfloat16": {"tie_word_embeddings": True, "dtype": "bfloat16"},
    "window": {"sliding_window": 20},
    "int8": {"quantize": "int8"},
    "nf4 bfloat16": {"quantize": "nf4", "dtype": "bfloat16"},
}
ENCODERS = {
    "bert": lambda dtype: Bert(BertConfig(**BERT, dtype=dtype)),
    "mpnet": lambda dtype: MPNet(MPNetConfig(**MPNET, dtype=dtype)),
}
# operands' dtypes and precision of a product in StableHLO's text
PRODUCT = re.compile(
    r"stablehlo\.dot_general[^\n]*?(?:precision = \[(\w+), \w+\][^\n]*)?: \(tensor<([^>]*)>, tensor<([^>]*)>\)"
)


def lowered(function, *arguments) -> str:
    """StableHLO for all of PLATFORMS; raises where an operation has no form there."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)), arguments)
    return export.export(jax.jit(function), platforms=PLATFORMS)(*shapes).mlir_module()


def products(text: str) -> list[tuple[str, str, str]]:
    """(left dtype, right dtype, precision) of every matrix product."""
    found = PRODUCT.findall(text)
    assert len(found) == text.count("stablehlo.dot_general") > 0
    return [(left.split("x")[-1], right.split("x")[-1], precision or "DEFAULT") for precision, left, right in found]


def assert_full_precision(text: str, is_half: bool) -> None:
    kinds = set(products(text))
    assert kinds <= {("f32", "f32", "HIGHEST"), ("bf16", "bf16", "DEFAULT")}, kinds
    assert (("bf16", "bf16", "DEFAULT") in kinds) == is_half


def assert_long_sums_are_float32(text: str) -> None:
    """No sum over an axis, and none into the rows of a table (its gradient), is rounded to bfloat16 on the way."""
    sums = re.findall(r"stablehlo\.reduce\([^\n]*applies stablehlo\.add [^\n]*", text)
    assert sums, "a loss has sums"
    assert not [line for line in sums if "bf16" in line]
    scatters = re.findall(r'"stablehlo\.scatter"[^\n]*\n.*?\}\) : \((tensor<[^>]*>)', text, re.DOTALL)
    tables = [f"tensor<{DECODER['vocab_size']}x{DECODER['hidden_size']}xbf16>"]
    assert not [shape for shape in scatters if shape in tables]


def test_a_product_that_keeps_its_default_is_seen():
    text = lowered(jnp.matmul, np.ones((2, 3), np.float32), np.ones((3, 4), np.float32))
    assert set(products(text)) == {("f32", "f32", "DEFAULT")}
    with pytest.raises(AssertionError):
        assert_full_precision(text, is_half=False)


def abstract(module, method=None):
    """Shapes and dtypes of a module's collections."""
    inputs = [jax.ShapeDtypeStruct((1, 1), np.int32)] * 3
    return jax.eval_shape(functools.partial(module.init, method=method), jax.random.key(0), *inputs)


@pytest.mark.parametrize(
    ("loss", "decoder", "encoder"),
    [
        *(("rag_token", decoder, "bert") for decoder in DECODERS),
        ("rag_sequence", "float32", "mpnet"),
        ("rag_sequence", "bfloat16", "mpnet"),
        (None, "nf4 bfloat16", "bert"),
    ],
)
def test_the_training_step_lowers(loss, decoder, encoder):
    options = DECODERS[decoder]
    generator = Decoder(DecoderConfig(**DECODER | {"lora": LoraConfig(rank=4), "remat": "partial"} | options))
    embedder = ENCODERS[encoder](options.get("dtype", "float32"))
    variables = abstract(generator, "full_logits")
    trainable, frozen = {"generator": {"lora": variables.pop("lora")}}, {"generator": variables}
    (trainable if loss else frozen)["embedder"] = abstract(embedder)
    objective = ConcatenatedObjective(generator)
    if loss:
        objective = AnswerObjective(embedder, generator, AnswerMixture(loss, score_scale=5.0))
    optimizer = make_optimizer(1.0, 0.01)
    state = jax.eval_shape(lambda tree: init_state(tree, RATES, optimizer), trainable)
    examples = random_examples(3, passages=3 if loss else 1)
    batch = jax.tree.map(lambda leaf: leaf[0], stacked_batch(examples, 1, 1, SHAPE))

    step = make_train_step(objective, optimizer, 10, 0.1, "sum", seed=0)(ONE_DEVICE)
    text = lowered(step, state, frozen, batch)
    assert_full_precision(text, "dtype" in options)
    assert_long_sums_are_float32(text)
    evaluate = make_eval_step(objective)(ONE_DEVICE)
    assert_full_precision(lowered(evaluate, trainable, frozen, batch), "dtype" in options)


def test_all_weights_in_bfloat16_have_gradients_that_are_summed_in_float32():
    generator, embedder = (
        Decoder(DecoderConfig(**DECODER, dtype="bfloat16", attention_bias=True)),
        ENCODERS["bert"]("bfloat16"),
    )
    trainable = {"generator": abstract(generator, "full_logits"), "embedder": abstract(embedder)}
    objective, optimizer = (
        AnswerObjective(embedder, generator, AnswerMixture("rag_token", 5.0)),
        make_optimizer(1.0, 0.01),
    )
    state = jax.eval_shape(lambda tree: init_state(tree, RATES, optimizer), trainable)
    batch = jax.tree.map(lambda leaf: leaf[0], stacked_batch(random_examples(3), 1, 1, SHAPE))
    text = lowered(make_train_step(objective, optimizer, 10, 0.1, "sum", seed=0)(ONE_DEVICE), state, {}, batch)
    assert_long_sums_are_float32(text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_encoder_lowers(encoder, dtype):
    module = ENCODERS[encoder](dtype)
    tokens, lengths = np.ones((4, 16), np.int32), np.full(4, 16, np.int32)
    text = lowered(functools.partial(sentence_vectors, module), abstract(module), tokens, lengths)
    assert_full_precision(text, dtype == "bfloat16")


@pytest.mark.parametrize(
    ("decoder", "beams"), [*((decoder, 1) for decoder in DECODERS), ("float32", 2), ("bfloat16", 2)]
)
def test_decoding_lowers(decoder, beams):
    module = Decoder(DecoderConfig(**DECODER | DECODERS[decoder]))
    variables = abstract(module, "full_logits")
    is_half = "dtype" in DECODERS[decoder]
    rule = beam_search.Rule(max_new_tokens=4, end_ids=(2, 3), num_beams=beams)
    passages, questions = 3, 2
    tokens, lengths = np.ones((questions * passages, 32), np.int32), np.full(questions * passages, 20, np.int32)
    weights, seeds = np.zeros((questions, passages), np.float32), np.zeros(questions, np.uint32)
    prefill = functools.partial(beam_search.prefill, module)
    begin = functools.partial(beam_search.begin, module, rule=rule)
    advance = functools.partial(beam_search.advance, module, rule=rule)
    last, prompts = jax.eval_shape(prefill, variables, tokens, lengths)
    asked = np.ones(questions, bool)
    state = jax.eval_shape(begin, variables, last, weights, asked, seeds)
    answers, answer_lengths = np.ones((questions, 2, 5), np.int32), np.full((questions, 2), 5, np.int32)
    score = functools.partial(beam_search.score_continuations, module)
    for function, arguments in (
        (prefill, (variables, tokens, lengths)),
        (begin, (variables, last, weights, asked, seeds)),
        (advance, (variables, prompts, weights, seeds, state, np.int32(5))),
        (score, (variables, last, prompts, answers, answer_lengths)),
    ):
        assert_full_precision(lowered(function, *arguments), is_half)


@pytest.mark.parametrize("recall", [1.0, 0.9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_search_lowers(dtype, recall):
    shards = place_vectors(
        ArrayVectors(np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)), dtype, block=16
    )
    search = functools.partial(search_on_device, k=3, recall=recall)
    text = lowered(search, np.zeros((2, 8), np.float32), shards)
    assert_full_precision(text, is_half=dtype != "float32")
