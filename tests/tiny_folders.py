"""Tiny embedders in the layouts in which other makers publish theirs, from the one that `write_tiny_bert` writes.

Each function changes a folder that `write_tiny_bert` or `write_tiny_mpnet` has written.
"""

import json
import shutil
from pathlib import Path
from typing import Any

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
