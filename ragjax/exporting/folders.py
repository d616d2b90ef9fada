"""The folders of an export, planned file by file: sentence-transformers, PEFT, Hugging Face.

Notable choices
- A model that was not trained is its source's files as they are; of one that was, all but the weights.
- From a source come weights, JSON, vocabularies, templates and licences; never a pickle, never code, and never what a
  link out of its folder leads to (the hub's cache has its files beside its folders, and links to them). Weights may be
  links: the run has recorded their hash.
- A sentence-transformers folder says what ragjax does: mean pooling, unit length, no prompt in front of a text. Where
  the source says less (a plain encoder's folder) or something else, that file is rewritten.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ragjax.config import RunConfig
from ragjax.errors import UserError
from ragjax.exporting.cards import Provenance, card, hub_name
from ragjax.files import PlannedFile, plan_copy, plan_json, plan_text, read_json, read_json_object
from ragjax.pretrained import ENCODERS
from ragjax.weights import ModelSource, load_tokenizer, read_config, read_embedder_settings
from ragjax.weights.save import INDEX_FILE, Trained, adapter_tensors, plan_safetensors, plan_weights, trained_tensors

_BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
_MODULES = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}


def plan_embedder(
    source: ModelSource, trained: Trained, provenance: Provenance, max_shard_bytes: int
) -> list[PlannedFile]:
    """embedder/: a sentence-transformers folder."""
    files = _model_files("embedder", source, trained, max_shard_bytes) | _sentence_files("embedder", source)
    what = "A sentence encoder that finds passages for questions: mean pooling, vectors of unit length."
    if trained.params:
        what += " It was fine-tuned for retrieval-augmented generation."
    else:
        what += " The run did not train it: these are the base model's weights."
    load = (
        "from sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer("PATH/embedder")\n'
        'vectors = model.encode(["What is the capital of France?"])'
    )
    readme = card("Embedder", "sentence-transformers", what, load, source, provenance)
    return [*files.values(), plan_text("embedder/README.md", readme)]


def plan_adapter(source: ModelSource, lora: Mapping[str, Any], provenance: Provenance) -> list[PlannedFile]:
    """adapter/: a PEFT folder with the generator's adapters."""
    base = hub_name(source) or str(source.path.resolve())
    tensors = adapter_tensors(lora, read_config(source)["model_type"])
    what = f"LoRA adapters of rank {provenance.config.lora_rank} for a generator that answers from passages."
    if stored := _quantised(source, provenance.config):
        what += (
            f" They were trained over weights stored as {stored}: over other copies of the base model the figures may"
        )
        what += " differ a little."
    load = (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        'model = PeftModel.from_pretrained(base, "PATH/adapter")'
    )
    readme = card("Generator adapter", "peft", what, load, source, provenance)
    return [
        plan_json("adapter/adapter_config.json", _peft_config(base, provenance.config)),
        plan_safetensors("adapter/adapter_model.safetensors", tensors),
        plan_text("adapter/README.md", readme),
    ]


def plan_generator(
    source: ModelSource, trained: Trained, provenance: Provenance, max_shard_bytes: int
) -> list[PlannedFile]:
    """generator/: a Hugging Face folder of the whole generator."""
    files = _model_files("generator", source, trained, max_shard_bytes)
    what = "A language model that answers questions from passages in its prompt."
    if trained.lora:
        what += (
            f" Adapters of rank {provenance.config.lora_rank} were trained and merged into the base model's weights."
        )
    elif trained.params:
        what += " All its weights were fine-tuned."
    else:
        what += " The run did not train it: these are the base model's weights."
    load = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH/generator")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH/generator")'
    )
    readme = card("Generator", "transformers", what, load, source, provenance)
    return [*files.values(), plan_text("generator/README.md", readme)]


def _quantised(source: ModelSource, config: RunConfig) -> str | None:
    """How the weights under the adapters were quantised in training, if they were."""
    return source.quantization if config.quantize == "none" else config.quantize


def _model_files(folder: str, source: ModelSource, trained: Trained, max_shard_bytes: int) -> dict[str, PlannedFile]:
    """Weights, config.json and tokenizer of a model by path."""
    if source.format == "gguf":
        files = _settings_of_gguf(folder, source)
    else:
        files = [plan_copy(f"{folder}/{path.name}", _inside(source, path)) for path in _beside_weights(source.path)]
    if trained.params or trained.lora or source.format == "gguf":
        files += plan_weights(folder, trained_tensors(source, trained), max_shard_bytes)
    else:
        index = () if source.files[0].name == "model.safetensors" else (_inside(source, source.path / INDEX_FILE),)
        files += [plan_copy(f"{folder}/{path.name}", path) for path in (*source.files, *index)]
    return {file.path: file for file in files}


def _beside_weights(folder: Path) -> list[Path]:
    """What a model's folder holds beside its weights; indexes name weight files and so go with those."""
    found = {path for pattern in _BESIDE_WEIGHTS for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not path.name.endswith(".index.json"))


def _inside(source: ModelSource, path: Path) -> Path:
    """The path. Raises UserError where a link leads out of the model's folder."""
    folder = source.path.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":  # models--OWNER--NAME/snapshots/REVISION in the hub's cache
        homes.append(folder.parent.parent / "blobs")
    if not source.origin.startswith("package") and not any(path.resolve().is_relative_to(home) for home in homes):
        raise UserError(
            f"{path} is a symbolic link out of its model's folder, which an export does not follow: put the file "
            "itself there, or remove the link."
        )
    return path


def _settings_of_gguf(folder: str, source: ModelSource) -> list[PlannedFile]:
    """config.json, generation_config.json and the tokenizer's files, made from a GGUF file's metadata."""
    config = read_config(source)
    tokenizer = load_tokenizer(source, config)
    del config["end_token_ids"]  # a field of ours
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens_map,
    }
    files = [
        plan_json(f"{folder}/config.json", config),
        plan_json(f"{folder}/generation_config.json", generation),
        plan_text(f"{folder}/tokenizer.json", tokenizer.backend_tokenizer.to_str(pretty=True)),
        plan_json(f"{folder}/tokenizer_config.json", settings),
    ]
    if tokenizer.chat_template:
        files.append(plan_text(f"{folder}/chat_template.jinja", tokenizer.chat_template))
    return files


def _sentence_files(folder: str, source: ModelSource) -> dict[str, PlannedFile]:
    """What makes a model's folder one of sentence-transformers: the source's own files where they say what we do."""
    config = read_config(source)
    model_config = ENCODERS[config["model_type"]][0].from_hf(config)
    longest = read_embedder_settings(source, model_config.longest_input)["max_seq_length"]
    files = []
    path = source.path / "sentence_bert_config.json"
    settings = read_json_object(path) if path.is_file() else {"do_lower_case": False}
    if settings.get("max_seq_length") != longest:
        files.append(plan_json(f"{folder}/{path.name}", settings | {"max_seq_length": longest}))
    path = source.path / "config_sentence_transformers.json"
    settings = read_json_object(path) if path.is_file() else {}
    if not settings or settings.get("default_prompt_name"):
        defaults = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
        files.append(plan_json(f"{folder}/{path.name}", defaults | settings | {"default_prompt_name": None}))
    pooling = _pooling_config(source.path)
    if pooling:
        files.append(plan_copy(f"{folder}/{pooling.parent.name}/config.json", _inside(source, pooling)))
    else:
        modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
        width = {"word_embedding_dimension": config["hidden_size"]}
        files.append(plan_json(f"{folder}/1_Pooling/config.json", width | modes))
        modules = [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(_MODULES.items())
        ]
        files.append(plan_json(f"{folder}/modules.json", modules))
    return {file.path: file for file in files}


def _pooling_config(folder: Path) -> Path | None:
    """The pooling's config.json of a folder whose modules.json asks for just what ragjax does, else None."""
    modules = read_json(folder / "modules.json") if (folder / "modules.json").is_file() else []
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if kinds != list(_MODULES.values()) or modules[0].get("path"):
        return None
    # Found by looking, not by the path that the file gives: that could lead anywhere.
    found = [path for path in folder.glob("*Pooling/config.json") if path.parent.name == modules[1].get("path")]
    return found[0] if found else None


def _peft_config(base: str, config: RunConfig) -> dict[str, Any]:
    alpha = config.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(config.lora_targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
