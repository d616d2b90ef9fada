"""Tiny embedders in the layouts in which other makers publish theirs, from the one that `write_tiny_bert` writes.

Each function changes a folder that `write_tiny_bert` or `write_tiny_mpnet` has written.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

PROMPTS = {"query": "question: ", "document": "text: "}


def edit(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file, which is made if it is not there; ... removes one."""
    content = json.loads(path.read_text()) if path.exists() else {}
    for key, value in changes.items():
        content.pop(key, None)
        if value is not ...:
            content[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def other_kinds(value: Any) -> list[Any]:
    """Values as people get them wrong, of another kind than this one."""
    if isinstance(value, bool):
        return ["true", 1]
    if isinstance(value, int | float):
        return [str(value), True]
    return [3] if isinstance(value, str) else ["x"]


def pool(folder: Path, mode: str) -> None:
    """The pooling in the switches that versions 2 to 5.3 write."""
    names = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
    switches = {f"pooling_mode_{name}": key == mode for key, name in names.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32} | switches))


def drop_modules(folder: Path, *kinds: str) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    kept = [module for module in modules if module["type"].rpartition(".")[2] not in kinds]
    (folder / "modules.json").write_text(json.dumps(kept))


def add_module(folder: Path, kind: str, path: str, place: int = 2) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules.insert(place, {"idx": 9, "name": path, "path": path, "type": kind})
    (folder / "modules.json").write_text(json.dumps(modules))


def make_plain(folder: Path) -> None:
    """Leaves what a model has that was saved without sentence-transformers."""
    for path in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        (folder / path).unlink(missing_ok=True)
    shutil.rmtree(folder / "1_Pooling", ignore_errors=True)


def as_newest(folder: Path, mode: str | list[str] = "mean") -> None:
    """The layout of versions from 5.4 on: other module types, one pooling_mode, the length in the tokenizer's file."""
    kinds = {
        "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
        "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    }
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        module["type"] = kinds[module["type"].rpartition(".")[2]]
    (folder / "modules.json").write_text(json.dumps(modules))
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    encoder = {"transformer_task": "feature-extraction", "modality_config": {"text": text}}
    (folder / "sentence_bert_config.json").write_text(json.dumps(encoder | {"module_output_name": "token_embeddings"}))
    edit(folder / "tokenizer_config.json", model_max_length=24, tokenizer_class="BertTokenizer")
    pooling = {"embedding_dimension": 32, "pooling_mode": mode, "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    names = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    edit(folder / "2_Normalize" / "config.json", **names)
    prompts = {"query": "", "document": ""}
    newest = {"model_type": "SentenceTransformer", "prompts": prompts, "default_prompt_name": None}
    edit(folder / "config_sentence_transformers.json", **newest, similarity_fn_name="cosine")


def vocabulary_only(folder: Path, **settings: Any) -> None:
    """vocab.txt in place of tokenizer.json, as before 2020; `settings` go into tokenizer_config.json."""
    path = folder / "tokenizer.json"
    vocabulary = json.loads(path.read_text())["model"]["vocab"]
    path.unlink()
    tokens = sorted(vocabulary, key=vocabulary.get)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    edit(folder / "tokenizer_config.json", **settings)


# ---- whole layouts -----------------------------------------------------------------------------------------


def e5(folder):
    edit(folder / "tokenizer_config.json", model_max_length=512, tokenizer_class="BertTokenizer")
    edit(folder / "sentence_bert_config.json", max_seq_length=512)


def bge(folder):
    pool(folder, "cls")
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    edit(folder / "tokenizer_config.json", do_basic_tokenize=True, never_split=None, strip_accents=None)
    edit(folder / "config_sentence_transformers.json", __version__={"sentence_transformers": "2.2.2"})


def mxbai(folder):
    pool(folder, "cls")
    drop_modules(folder, "Normalize")
    edit(folder / "config_sentence_transformers.json", prompts={"query": "Find: ", "passage": ""})


def arctic(folder):
    pool(folder, "cls")
    edit(folder / "config_sentence_transformers.json", prompts={"query": "Find: "}, default_prompt_name=None)


def default_prompt(folder):
    edit(folder / "config_sentence_transformers.json", prompts=PROMPTS, default_prompt_name="document")


def dot(folder):
    pool(folder, "cls")
    drop_modules(folder, "Normalize")
    edit(folder / "config_sentence_transformers.json", similarity_fn_name="dot", prompts={})


def largest(folder):
    pool(folder, "max")


def with_dropout(folder):
    add_module(folder, "sentence_transformers.models.Dropout", "2_Dropout")
    edit(folder / "2_Dropout" / "config.json", dropout=0.2)


def newest(folder):
    as_newest(folder)


def newest_list(folder):
    as_newest(folder, ["cls"])


def no_switch_at_all(folder):
    edit(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False)


def tokenizers_length(folder):
    edit(folder / "sentence_bert_config.json", max_seq_length=None)
    edit(folder / "tokenizer_config.json", model_max_length=20)


def older_length(folder):
    edit(folder / "sentence_bert_config.json", max_seq_length=None)
    edit(folder / "tokenizer_config.json", model_max_length=..., max_len=20)


def cut_on_the_left(folder):
    edit(folder / "tokenizer_config.json", truncation_side="left", model_max_length=20)
    edit(folder / "sentence_bert_config.json", max_seq_length=...)


def cased_by_its_settings(folder):
    edit(folder / "tokenizer_config.json", do_lower_case=False, tokenizer_class="BertTokenizer")


def settings_of_another_class(folder):
    edit(folder / "tokenizer_config.json", do_lower_case=False, tokenizer_class="PreTrainedTokenizerFast")


def lower_case_over_a_cased_one(folder):
    cased_by_its_settings(folder)
    edit(folder / "sentence_bert_config.json", do_lower_case=True)


def vocabulary(folder):
    vocabulary_only(folder)


def cased_vocabulary(folder):
    vocabulary_only(folder, do_lower_case=False, tokenize_chinese_chars=False)


def accented_vocabulary(folder):
    vocabulary_only(folder, strip_accents=False, tokenizer_class="BertTokenizerFast")


def multilingual(folder):
    """A BERT with SentencePiece's Unigram tokenizer, as the multilingual E5 and MiniLM."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    words = [token for token in vocabulary if token.isalpha()]
    pieces = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        *(f"\u2581{word}" for word in words),
        "\u2581",
        *"bcdfghjklmnopqrstuvwxyz",
    ]
    pieces = list(dict.fromkeys([*pieces, *words]))[:290]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - 0.01 * i) for i, piece in enumerate(pieces)], unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    tokenizer.add_special_tokens(pieces[:4])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(roles | {"eos_token": "</s>", "tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 512})
    )


def plain(folder):
    make_plain(folder)


def plain_with_vocabulary(folder):
    make_plain(folder)
    vocabulary_only(folder, model_max_length=30)
    for name in ("layer_norm_eps", "type_vocab_size"):
        edit(folder / "config.json", **{name: ...})


LAYOUTS = [
    e5, bge, mxbai, arctic, default_prompt, dot, largest, with_dropout, newest, newest_list, no_switch_at_all,
    tokenizers_length, older_length, cut_on_the_left, cased_by_its_settings, settings_of_another_class,
    lower_case_over_a_cased_one, vocabulary, cased_vocabulary, accented_vocabulary, multilingual, plain,
    plain_with_vocabulary,
]  # fmt: skip


def make_cross_encoder(folder: Path, seed: int = 1) -> Path:
    """Turns the folder of a tiny BERT or MPNet into one of a cross-encoder, as transformers saves it; returns it."""
    config = json.loads((folder / "config.json").read_text())
    family, wide = config["model_type"], config["hidden_size"]
    name = {"bert": "Bert", "mpnet": "MPNet"}[family]
    edit(folder / "config.json", architectures=[f"{name}ForSequenceClassification"], id2label={"0": "LABEL_0"})
    edit(folder / "config.json", label2id={"LABEL_0": 0}, sentence_transformers={"version": "4.0.0"})
    weights = {f"{family}.{key}": value for key, value in load_file(folder / "model.safetensors").items()}
    shapes = {"classifier": (1, wide)}
    if family == "mpnet":  # its classifier has the layer that BERT calls a pooler
        weights = {key: value for key, value in weights.items() if ".pooler." not in key}
        shapes = {"classifier.dense": (wide, wide), "classifier.out_proj": (1, wide)}
    rng = np.random.default_rng(seed)
    for part, shape in shapes.items():
        weights[f"{part}.weight"] = rng.normal(0, 0.5, shape).astype(np.float32)
        weights[f"{part}.bias"] = rng.normal(0, 0.5, shape[0]).astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for path in ("modules.json", "sentence_bert_config.json"):
        (folder / path).unlink()
    shutil.rmtree(folder / "1_Pooling")
    return folder
