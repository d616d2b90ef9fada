"""The folders of an export, planned file by file: sentence-transformers, PEFT, Hugging Face.

Notable choices
- A model that was not trained is its source's files as they are; of one that was, all but the weights.
- From a source come weights, JSON, vocabularies, templates and licences; never a pickle, never code, and never what a
  link out of its folder leads to (the hub's cache has its files beside its folders, and links to them). Weights may be
  links: the run has recorded their hash.
- A sentence-transformers folder says what ragjax does: pooling, unit length, and the prefixes that the run used, as the
  prompts "query" and "document". A file of the source that says less or otherwise is written anew, in the layout that
  sentence-transformers has read since version 2.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ragjax.config import RunConfig
from ragjax.errors import UserError
from ragjax.exporting.cards import Provenance, card, hub_name
from ragjax.files import PlannedFile, plan_copy, plan_json, plan_text, read_json_object
from ragjax.models import EncoderConfig
from ragjax.pretrained import ENCODERS
from ragjax.weights import EmbedderSettings, ModelSource, load_tokenizer, read_config, read_embedder_settings
from ragjax.weights.save import INDEX_FILE, Trained, adapter_tensors, plan_safetensors, plan_weights, trained_tensors
from ragjax.weights.sentence_folder import ENCODER_FILES, MODULES_FILE, POOLING_SWITCHES, PROMPTS_FILE

_BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
_MODULES = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
_COSINES = ("cosine", "dot")  # what ranks vectors of unit length as ragjax does


def plan_embedder(
    source: ModelSource, trained: Trained, provenance: Provenance, max_shard_bytes: int
) -> list[PlannedFile]:
    """embedder/: a sentence-transformers folder."""
    config = provenance.config
    settings = read_embedder_settings(
        source, _encoder_config(source).longest_input, config.query_prefix, config.passage_prefix
    )
    files = _model_files("embedder", source, trained, max_shard_bytes) | _sentence_files("embedder", source, settings)
    what = f"A sentence encoder that finds passages for questions: {settings.pooling} pooling, vectors of unit length."
    if trained.params:
        what += " It was fine-tuned for retrieval-augmented generation."
    else:
        what += " The run did not train it: these are the base model's weights."
    load = (
        "from sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer("PATH/embedder")\n'
        'questions = model.encode_query(["What is the capital of France?"])\n'
        'passages = model.encode_document(["Paris is the capital of France."])'
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
    if isinstance(tokenizer.chat_template, str):  # a GGUF file has one, or none
        files.append(plan_text(f"{folder}/chat_template.jinja", tokenizer.chat_template))
    return files


def _encoder_config(source: ModelSource) -> EncoderConfig:
    config = read_config(source)
    return ENCODERS[config["model_type"]][0].from_hf(config)


def _sentence_files(folder: str, source: ModelSource, settings: EmbedderSettings) -> dict[str, PlannedFile]:
    """What makes a model's folder one of sentence-transformers, besides files of the source that say the same."""
    files = []
    found = next((path for name in ENCODER_FILES if (path := source.path / name).is_file()), None)
    content = read_json_object(found) if found else {"do_lower_case": False}
    if content.get("max_seq_length") != settings.max_seq_length:
        files.append(plan_json(f"{folder}/{ENCODER_FILES[0]}", content | {"max_seq_length": settings.max_seq_length}))
    path = source.path / PROMPTS_FILE
    content = read_json_object(path) if path.is_file() else {}
    said = {"query": "", "document": ""} | {name: text or "" for name, text in (content.get("prompts") or {}).items()}
    similarity = content.get("similarity_fn_name")
    if said != settings.prompts or similarity not in _COSINES:
        says = {"prompts": dict(settings.prompts), "default_prompt_name": settings.default_prompt_name}
        says["similarity_fn_name"] = similarity if similarity in _COSINES else "cosine"
        files.append(plan_json(f"{folder}/{path.name}", content | says))
    pooling = settings.pooling_file
    if pooling is not None and settings.modules == tuple(_MODULES.values()):
        files.append(plan_copy(f"{folder}/{pooling.parent.name}/{pooling.name}", _inside(source, pooling)))
        return {file.path: file for file in files}
    modes = {key: mode == settings.pooling for key, mode in POOLING_SWITCHES.items()}
    width = {"word_embedding_dimension": _encoder_config(source).hidden_size}
    files.append(plan_json(f"{folder}/1_Pooling/config.json", width | modes))
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(_MODULES.items())
    ]
    files.append(plan_json(f"{folder}/{MODULES_FILE}", modules))
    return {file.path: file for file in files}


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
