"""Every setting that docs/models.md says is followed: another value changes an answer, or the model is refused."""

import json
import re

import gguf
import jax
import numpy as np
import pytest
from gguf import GGUFValueType

from ragjax.data.prompts import PromptBuilder
from ragjax.data.questions import Passage
from ragjax.errors import UserError
from ragjax.models.decoder_config import DEFAULTS
from ragjax.models.rope import SCALINGS
from ragjax.pretrained import load_generator
from ragjax.weights import resolve_model
from ragjax.weights.gguf import ARCHITECTURES
from ragjax.weights.gguf import SCALINGS as GGUF_SCALINGS
from ragjax.weights.gguf_tokenizer import CUTS
from ragjax.weights.resolve import KNOWN_MODELS
from tests.checkout import ROOT, in_checkout
from tests.tiny import CHAT_TEMPLATE, write_tiny_gguf, write_tiny_llama
from tests.tiny_folders import edit, other_kinds

DOCUMENT = ROOT / "docs" / "models.md"
TOKENS = np.random.default_rng(1).integers(0, 384, (1, 40))
PASSAGE = Passage("a", "The old town", "The river runs past 12 bridges,  to the sea.")


def section() -> str:
    return re.search(r"^## Generators\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S)[1]


def documented(row: str) -> list[str]:
    """What stands between backticks in the second column of the row that begins with these words."""
    (line,) = [line for line in section().splitlines() if line.startswith(f"| {row}")]
    return re.findall(r"`([^`]+)`", line.split("|")[2])


def answers_of(path) -> dict:
    """All that decides an answer: logits, prompts of both styles, where training and decoding end, and the window."""
    generator = load_generator(path)
    with jax.disable_jit():
        logits = np.asarray(generator.logits(TOKENS))
    window = generator.config.max_position_embeddings
    prompts = [
        PromptBuilder(generator.tokenizer, generator.eos_token_id, 64, 4096, style).prompt([PASSAGE], "Why?", 0)
        for style in ("paper", "chat")
    ]
    answer = generator.answer_ids("the town <think>")
    return {"logits": logits.tobytes(), "prompts": prompts, "ends": (generator.end_ids, answer), "window": window}


KNOWN: dict[str, dict] = {}  # answers of what many keys are changed in, by the model's sha256


def assert_followed(base, changed) -> None:
    """`base` and `changed` write a model and return its path."""
    path = base()
    sha256 = resolve_model(path).sha256
    before = KNOWN[sha256] if sha256 in KNOWN else KNOWN.setdefault(sha256, answers_of(path))
    try:
        after = answers_of(changed())
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert after != before


# ---- what is documented ---------------------------------------------------------------------------------------------


@in_checkout
def test_the_table_names_what_the_code_reads():
    assert documented("model types") == list(DEFAULTS)
    assert documented("rope types") == list(SCALINGS)
    assert documented("GGUF architectures") == list(ARCHITECTURES)
    assert documented("GGUF rope scaling") == list(GGUF_SCALINGS)
    assert documented("GGUF tokenizers: byte-level") == list(CUTS)
    followed = set().union(*(keys for keys, _ in SCALINGS.values()))
    assert set(documented("rope_scaling")) == followed | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


@in_checkout
def test_the_table_names_every_short_name():
    rows = re.findall(r"^\| `([^`]+)` \| (\S+/\S+) \|$", section(), re.M)
    assert rows == [(known.short, known.hub) for known in KNOWN_MODELS if known.model_type in DEFAULTS]


# ---- folders --------------------------------------------------------------------------------------------------------

WIDE = {"head_dim": 16, "rope_theta": 100.0, "max_position_embeddings": 32}
MISTRAL = {"model_type": "mistral", "sliding_window": 8}
QWEN = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DEEPSEEK = YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"type": "linear", "factor": 2.0}
# The config.json that a key is changed in, and its other value.
CONFIG = {
    "model_type": ({}, "qwen3"),
    "vocab_size": ({}, 400),
    "hidden_size": ({}, 48),
    "intermediate_size": ({}, 48),
    "num_hidden_layers": ({}, 1),
    "num_attention_heads": ({}, 2),
    "num_key_value_heads": ({}, 1),
    "head_dim": ({}, 16),
    "max_position_embeddings": ({}, 64),
    "rms_norm_eps": ({}, 0.1),
    "hidden_act": ({}, "gelu"),
    "is_causal": ({}, False),
    "tie_word_embeddings": ({}, False),
    "attention_bias": ({}, True),
    "mlp_bias": ({}, True),
    "sliding_window": (MISTRAL, 9),
    "use_sliding_window": (QWEN, False),
    "max_window_layers": (QWEN, 2),
    "layer_types": (QWEN, ["full_attention"] * 2),
    "rope_theta": ({}, 5000.0),
    "rope_scaling": ({}, LINEAR),
    "rope_parameters": ({}, LINEAR),
    "original_max_position_embeddings": ({**WIDE, "rope_scaling": YARN}, 8),
    "partial_rotary_factor": ({}, 0.5),
    "eos_token_id": ({}, [2, 0]),
    "quantization_config": ({}, {"quant_method": "gptq"}),
    "compression_config": ({}, {"format": "int-quantized"}),
    "quantization": ({}, {"bits": 4}),
}
# The same of rope_scaling, one or more for each key.
ROPE = {
    "rope_type": [(YARN, "linear"), ({"rope_type": "linear", "factor": 2.0}, "dynamic")],
    "type": [(LINEAR, "dynamic")],
    "rope_theta": [(LINEAR, 50.0)],
    "partial_rotary_factor": [(LINEAR, 0.5)],
    "factor": [(LINEAR, 3.0), ({"type": "dynamic", "factor": 2.0}, 3.0), (YARN, 2.0), (LLAMA3, 4.0)],
    "original_max_position_embeddings": [(YARN, 8), (LLAMA3, 64)],
    "attention_factor": [(YARN, 2.0)],
    "beta_fast": [(YARN, 1.0)],
    "beta_slow": [(YARN, 0.5)],
    "mscale": [(DEEPSEEK, 2.0)],
    "mscale_all_dim": [(DEEPSEEK, 2.0)],
    "truncate": [(YARN, False)],
    "low_freq_factor": [(LLAMA3, 0.5)],
    "high_freq_factor": [(LLAMA3, 2.0)],
}


@in_checkout
def test_every_key_of_a_folder_is_tried():
    assert documented("config.json") == list(CONFIG)
    assert documented("rope_scaling") == list(ROPE)
    assert documented("generation_config.json") == ["eos_token_id"]
    assert documented("tokenizer_config.json") == list(TOKENIZER)


@pytest.mark.parametrize("key", CONFIG)
def test_a_key_of_config_json_is_followed(tmp_path, key):
    """The weights stay what they are."""
    base, value = CONFIG[key]
    folder = write_tiny_llama(tmp_path, seed=2, **base)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if key == "rope_parameters":  # the newer spelling, instead of the older one
        del config["rope_scaling"]

    def changed():
        path.write_text(json.dumps(config | {key: value}))
        (folder / "generation_config.json").unlink()
        return folder

    assert_followed(lambda: folder, changed)


@pytest.mark.parametrize(("key", "base", "value"), [(key, *case) for key, cases in ROPE.items() for case in cases])
def test_a_key_of_the_rope_scaling_is_followed(tmp_path, key, base, value):
    assert_followed(
        lambda: write_tiny_llama(tmp_path / "base", seed=2, **WIDE, rope_scaling=base),
        lambda: write_tiny_llama(tmp_path / "changed", seed=2, **WIDE, rope_scaling=base | {key: value}),
    )


TOKENIZER = {
    "bos_token": ({"add_bos_token": True}, "<|endoftext|>"),
    "eos_token": ({}, "<|endoftext|>"),
    "add_bos_token": ({}, True),
    "add_eos_token": ({}, True),
    "added_tokens_decoder": ({}, {"384": {"content": "<think>", "special": False}}),
    "chat_template": ({}, "{{ messages[0]['content'] }} So:"),
}
SETTINGS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}


@pytest.mark.parametrize("key", [key for key in TOKENIZER if key != "add_eos_token"])
def test_a_key_of_tokenizer_config_json_is_followed(tmp_path, key):
    base, value = TOKENIZER[key]
    folder = write_tiny_llama(tmp_path, vocab_size=385, eos_token_id=[0, 2])

    def write(**settings):
        (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | settings))
        return folder

    assert_followed(lambda: write(**base), lambda: write(**base | {key: value}))


WRONG = [
    *(("config.json", key, base, wrong) for key, (base, value) in CONFIG.items() for wrong in other_kinds(value)),
    *(
        ("config.json", key, {**WIDE, "rope_scaling": base | {key: wrong}}, ...)
        for key, [(base, value), *_] in ROPE.items()
        for wrong in other_kinds(value)
    ),
    *(
        ("tokenizer_config.json", key, {}, wrong)
        for key, (_, value) in TOKENIZER.items()
        for wrong in other_kinds(value)
    ),
    ("generation_config.json", "eos_token_id", {}, "2"),
    ("special_tokens_map.json", "eos_token", {}, 3),
    ("tokenizer_config.json", "eos_token", {}, {"content": 3}),
    ("tokenizer_config.json", "special", {}, {"384": {"content": "<think>", "special": "false"}}),
]


@pytest.mark.parametrize(("file", "key", "base", "wrong"), WRONG)
def test_a_value_of_another_kind_is_refused_by_file_and_key(tmp_path, file, key, base, wrong):
    """Text in place of true or false, of a number, and so on; "..." is wrong in the base already."""
    folder = write_tiny_llama(tmp_path, **base)
    if wrong is not ...:
        edit(folder / file, **{"added_tokens_decoder" if key == "special" else key: wrong})
    with pytest.raises(UserError) as caught:
        load_generator(folder)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    if "quantization" not in key and key != "compression_config":  # one sentence for all three
        assert f"{folder / file} has" in message or f"{folder / file}: " in message
        assert key in message or (key == "rope_type" and "rope type" in message)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", [384, [2, 100000]])
def test_an_end_token_beyond_the_vocabulary_is_refused(tmp_path, name, ids):
    folder = write_tiny_llama(tmp_path)
    edit(folder / name, eos_token_id=ids)
    with pytest.raises(UserError) as caught:
        load_generator(folder)
    assert f"{folder / name} has eos_token_id = {ids!r}, but the model's vocabulary ends at 383" in str(caught.value)


def test_other_special_tokens_beyond_the_vocabulary(tmp_path):
    """A first token is refused; a padding token is never fed, and many fine-tunes have one beyond."""
    folder = write_tiny_llama(tmp_path)
    edit(folder / "config.json", pad_token_id=384)
    load_generator(folder)
    edit(folder / "config.json", bos_token_id=384)
    with pytest.raises(UserError, match="config.json has bos_token_id = 384, but the model's vocabulary ends at 383"):
        load_generator(folder)


def test_a_theta_of_another_kind_is_found_where_it_stands(tmp_path):
    folder = write_tiny_llama(tmp_path, rope_theta="10000")
    with pytest.raises(UserError) as caught:
        load_generator(folder)
    path = folder / "config.json"
    assert str(caught.value) == f"{path} has rope_theta = '10000' where a number above 1 is needed: correct it"
    write_tiny_llama(folder, rope_scaling=LINEAR | {"rope_theta": "10000"})
    with pytest.raises(UserError) as caught:
        load_generator(folder)
    assert f"{path} has rope_theta = '10000' in rope_scaling where" in str(caught.value)


def test_an_end_token_that_is_put_behind_texts_is_not_put_behind_prompts(tmp_path):
    """add_eos_token is followed by the tokenizer; a prompt has to go on."""
    folder = write_tiny_llama(tmp_path)
    before = load_generator(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | {"add_eos_token": True}))
    after = load_generator(folder)
    assert after.tokenizer("a")["input_ids"] == [*before.tokenizer("a")["input_ids"], 2]
    assert after.prompt_ids("a") == before.prompt_ids("a")


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja"])
def test_the_other_files_of_a_tokenizer_are_followed(tmp_path, name):
    folder = write_tiny_llama(tmp_path, vocab_size=385, eos_token_id=[0, 2])
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    content = {
        "special_tokens_map.json": json.dumps({"eos_token": "<|im_end|>"}),
        "added_tokens.json": json.dumps({"<think>": 384}),
        "chat_template.jinja": "{{ messages[0]['content'] }} So:",
    }

    def changed():
        (folder / name).write_text(content[name])
        return folder

    assert_followed(lambda: folder, changed)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_token_of_either_file_ends_a_generated_answer(tmp_path, name):
    folder = write_tiny_llama(tmp_path, seed=3)
    prompt = [list(range(5, 30))]
    (answer,) = load_generator(folder).generate_tokens(prompt, 6)
    assert len(answer) > 3
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, answer[2]]}))
    assert load_generator(folder).generate_tokens(prompt, 6) == [answer[: answer.index(answer[2])]]


# ---- GGUF -----------------------------------------------------------------------------------------------------------

LINEAR_FILE = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
YARN_FILE = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
FILE = {
    "general.architecture": ({}, "qwen2"),
    "llama.context_length": ({}, 64),
    "llama.embedding_length": ({}, 48),
    "llama.block_count": ({}, 1),
    "llama.feed_forward_length": ({}, 48),
    "llama.attention.head_count": ({}, 2),
    "llama.attention.head_count_kv": ({}, 1),
    "llama.attention.key_length": ({}, 16),
    "llama.attention.value_length": ({}, 16),
    "llama.attention.layer_norm_rms_epsilon": ({}, 0.1),
    "llama.rope.dimension_count": ({}, 4),
    "llama.rope.freq_base": ({}, 5000.0),
    "llama.rope.scaling.type": (LINEAR_FILE, "yarn"),
    "llama.rope.scaling.factor": (LINEAR_FILE, 3.0),
    "llama.rope.scaling.original_context_length": (YARN_FILE, 8),
    "llama.rope.scale_linear": ({}, 2.0),
    "tokenizer.ggml.model": ({}, "llama"),
    "tokenizer.ggml.pre": ({"tokenizer.ggml.add_bos_token": ...}, "llama-bpe"),
    "tokenizer.ggml.tokens": ({}, lambda tokens: [*tokens[:-1], "never"]),
    "tokenizer.ggml.token_type": ({}, lambda kinds: [1, *kinds[1:]]),
    "tokenizer.ggml.merges": ({}, lambda merges: merges[::-1]),
    "tokenizer.ggml.add_bos_token": ({}, True),
    "tokenizer.ggml.add_eos_token": ({}, True),
    "tokenizer.ggml.bos_token_id": ({"tokenizer.ggml.add_bos_token": True}, 0),
    "tokenizer.ggml.eos_token_id": ({}, 0),
    "tokenizer.ggml.eot_token_id": ({}, 0),
    "tokenizer.ggml.eom_token_id": ({}, 0),
    "tokenizer.chat_template": ({}, "{{ messages[0]['content'] }} So:"),
}
# Followed where no answer shows it: a prompt ends without an end token, and text never becomes a control token.
UNSEEN = ("tokenizer.ggml.add_eos_token", "tokenizer.ggml.token_type")


@in_checkout
def test_every_key_of_a_gguf_file_is_tried():
    assert documented(".gguf |") == list(FILE)
    # In test_gguf_tokenizer.py.
    assert documented(".gguf with") == ["tokenizer.ggml.scores", "tokenizer.ggml.add_space_prefix"]


@pytest.mark.parametrize("key", [key for key in FILE if key not in UNSEEN])
def test_a_key_of_a_gguf_file_is_followed(tmp_path, key):
    base, value = FILE[key]

    def write(name, **settings):
        def edit(writer):
            (data,) = writer.kv_data
            for key, value in settings.items():
                if value is ...:
                    del data[key]
                    continue
                value = value(data[key].value) if callable(value) else value
                kind = data[key].type if key in data else GGUFValueType.get_type(value)
                data[key] = gguf.GGUFValue(value, kind)

        return write_tiny_gguf(tmp_path / name, seed=2, edit=edit)

    assert_followed(lambda: write("base.gguf", **base), lambda: write("changed.gguf", **base | {key: value}))
