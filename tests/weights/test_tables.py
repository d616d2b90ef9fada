"""ragjax.weights.tables: one row for each parameter, in both directions, and none too few for the models."""

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util

from ragjax.errors import UserError
from ragjax.models.bert import Bert, BertConfig
from ragjax.models.decoder import Decoder
from ragjax.models.decoder_config import DecoderConfig
from ragjax.models.mpnet import MPNet, MPNetConfig
from ragjax.weights.tables import BERT, GGUF_LLAMA, LLAMA, MPNET, TABLES, table_for
from tests.tiny import bert_tokenizer, gguf_name, llama_config, llama_tokenizer, llama_weights, mpnet_weights

BERT_CONFIG = {
    "model_type": "bert",
    "vocab_size": bert_tokenizer().get_vocab_size(),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


def paths(module, **how) -> set[str]:
    """The paths of a model's parameters, from its own initialisation."""
    inputs = [jnp.zeros((1, 1), jnp.int32)] * 3
    shapes = jax.eval_shape(lambda key: module.init(key, *inputs, **how)["params"], jax.random.key(0))
    return set(traverse_util.flatten_dict(shapes, sep="/"))


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_name_leads_to_its_row_and_back(table):
    for row in table.rows:
        for layer in (0, 7, 12) if row.stacked else (None,):
            assert table.find(row.name(layer)) == (row, layer)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_no_two_rows_share_a_name_or_a_path(table):
    assert len({row.hf for row in table.rows}) == len({row.path for row in table.rows}) == len(table.rows)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_kernels_and_nothing_else_are_transposed(table):
    assert {row.path for row in table.rows if row.transposed} == {
        row.path for row in table.rows if row.path.endswith("/kernel")
    }


def test_the_bert_table_fills_the_model_and_no_more():
    assert {row.path for row in BERT.rows} == paths(Bert(BertConfig.from_hf(BERT_CONFIG)))


def test_the_mpnet_table_fills_the_model_and_no_more():
    config = BERT_CONFIG | {"model_type": "mpnet"}
    assert {row.path for row in MPNET.rows} == paths(MPNet(MPNetConfig.from_hf(config)))


def test_the_mpnet_rows_are_the_names_of_real_files():
    config = BERT_CONFIG | {"relative_attention_num_buckets": 32, "torch_dtype": "float32"}
    for name in mpnet_weights(config, seed=0):
        assert MPNET.is_unused(name) is (MPNET.find(name) is None), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_llama_table_fills_the_model_and_has_only_biases_and_the_head_to_spare(tied):
    config = llama_config(llama_tokenizer()) | {"tie_word_embeddings": tied}
    wanted = paths(Decoder(DecoderConfig.from_hf(config)), method="full_logits")
    spare = {row.path for row in LLAMA.rows} - wanted
    assert wanted <= {row.path for row in LLAMA.rows}
    norms = {"layers/self_attn/q_norm/scale", "layers/self_attn/k_norm/scale"}  # of Qwen3
    assert {path for path in spare if not path.endswith("/bias")} == norms | ({"lm_head/kernel"} if tied else set())


@pytest.mark.parametrize(
    "name", ["model.norm.weight.x", "x.model.norm.weight", "model-norm.weight", "model.layers.a.mlp"]
)
def test_a_pattern_matches_whole_names_only(name):
    assert LLAMA.find(name) is None


@pytest.mark.parametrize(
    ("table", "name", "respelled"),
    [
        (BERT, "bert.encoder.layer.3.output.dense.bias", "encoder.layer.3.output.dense.bias"),
        (BERT, "bert.embeddings.LayerNorm.gamma", "embeddings.LayerNorm.weight"),
        (BERT, "encoder.layer.0.attention.output.LayerNorm.beta", "encoder.layer.0.attention.output.LayerNorm.bias"),
        (BERT, "embeddings.LayerNorm.weight", "embeddings.LayerNorm.weight"),
        (MPNET, "mpnet.encoder.layer.3.attention.attn.q.bias", "encoder.layer.3.attention.attn.q.bias"),
        (MPNET, "mpnet.encoder.relative_attention_bias.weight", "encoder.relative_attention_bias.weight"),
        (MPNET, "encoder.layer.0.attention.LayerNorm.weight", "encoder.layer.0.attention.LayerNorm.weight"),
        (LLAMA, "layers.11.mlp.up_proj.weight", "model.layers.11.mlp.up_proj.weight"),
        (LLAMA, "embed_tokens.weight", "model.embed_tokens.weight"),
        (LLAMA, "norm.weight", "model.norm.weight"),
        (LLAMA, "model.norm.weight", "model.norm.weight"),
        (LLAMA, "lm_head.weight", "lm_head.weight"),
        (LLAMA, "normal.weight", "normal.weight"),
    ],
)
def test_other_spellings_of_real_files(table, name, respelled):
    assert table.respell(name) == respelled


@pytest.mark.parametrize(
    ("table", "name", "unused"),
    [
        (BERT, "pooler.dense.weight", True),
        (BERT, "embeddings.position_ids", True),
        (BERT, "cls.predictions.bias", True),
        (BERT, "embeddings.position_embeddings.weight", False),
        (BERT, "classifier.weight", False),
        (MPNET, "pooler.dense.bias", True),
        (MPNET, "embeddings.position_ids", True),
        (MPNET, "lm_head.layer_norm.weight", True),
        (MPNET, "lm_head.decoder.bias", True),
        (MPNET, "encoder.relative_attention_bias.weight", False),
        (MPNET, "embeddings.token_type_embeddings.weight", False),
        (LLAMA, "model.layers.31.self_attn.rotary_emb.inv_freq", True),
        (LLAMA, "model.layers.31.self_attn.q_proj.weight", False),
        (LLAMA, "lm_head.weight", False),
    ],
)
def test_only_listed_weights_are_unused(table, name, unused):
    assert table.is_unused(name) is unused


def test_gguf_names_are_llama_cpps():
    theirs = {}
    for kind in ({"attention_bias": True, "mlp_bias": True}, {"model_type": "qwen3"}):
        config = llama_config(llama_tokenizer()) | {"tie_word_embeddings": False} | kind
        theirs |= {name: gguf_name(name) for name in llama_weights(config, 0)}
    for name, key in theirs.items():
        (row,) = [row for row in GGUF_LLAMA if row.pattern.fullmatch(key)]
        assert row.hf.format(**row.pattern.fullmatch(key).groupdict()) == name
    assert {row.gguf for row in GGUF_LLAMA} == {key.replace("blk.1.", "blk.{layer}.") for key in theirs.values()} - {
        key for key in theirs.values() if key.startswith("blk.0.")
    }


def test_an_unknown_model_type_is_named_with_those_that_are_read():
    with pytest.raises(
        UserError, match=r"some/config.json: model_type 'gpt_neox' is not supported .* 'bert' and 'mpnet', .* 'llama'"
    ):
        table_for("gpt_neox", "some/config.json")
    with pytest.raises(UserError, match="model_type None"):
        table_for(None, "some/config.json")
