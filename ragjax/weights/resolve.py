"""From the name of a model to the weight files behind it.

A name is, in this order: a local folder or .gguf file; an installed weight package (third_party/); a model of
the Hugging Face hub, from its cache or by download. What was found is a `ModelSource`, whose one-line
description is the first thing that a command prints.

Notable choices
- The weights' sha256 is always taken: for a package (packages.py) it must be the pinned one. What is recorded with
  runs, vectors and predictions covers the settings and the tokenizer too: other ones make another model of them.
- From the hub come safetensors, JSON and tokenizer files only, config.json first: a model type that cannot be
  served is refused before gigabytes of it are downloaded. Nothing of a repository is ever run.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ragjax.errors import UserError, reason
from ragjax.files import read_json_object, sha256_file
from ragjax.weights import tables
from ragjax.weights.packages import PACKAGES, SLICED, installed_file, joined_folder


@dataclass(frozen=True)
class KnownModel:
    """A short name, the hub's name for the same model, and its config.json's model_type.

    query_prefix, passage_prefix: what its model card asks for and its repository's files do not say.
    """

    short: str
    hub: str
    model_type: str
    query_prefix: str = ""
    passage_prefix: str = ""


_BGE_QUERY = "Represent this sentence for searching relevant passages: "

KNOWN_MODELS = (
    KnownModel("minilm", "sentence-transformers/all-MiniLM-L6-v2", "bert"),
    KnownModel("mpnet", "sentence-transformers/all-mpnet-base-v2", "mpnet"),
    KnownModel("bge-small", "BAAI/bge-small-en-v1.5", "bert", query_prefix=_BGE_QUERY),
    KnownModel("bge-base", "BAAI/bge-base-en-v1.5", "bert", query_prefix=_BGE_QUERY),
    KnownModel("e5-small", "intfloat/e5-small-v2", "bert", query_prefix="query: ", passage_prefix="passage: "),
    KnownModel("e5-base", "intfloat/e5-base-v2", "bert", query_prefix="query: ", passage_prefix="passage: "),
    KnownModel("gte-small", "thenlper/gte-small", "bert"),
    KnownModel("gte-base", "thenlper/gte-base", "bert"),
    KnownModel("multi-qa-mpnet", "sentence-transformers/multi-qa-mpnet-base-dot-v1", "mpnet"),
    KnownModel("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "llama"),
    KnownModel("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", "llama"),
    KnownModel("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "llama"),
    KnownModel("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama"),
    KnownModel("llama3-8b", "meta-llama/Meta-Llama-3-8B-Instruct", "llama"),
    KnownModel("llama3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", "llama"),
    KnownModel("llama3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", "llama"),
    KnownModel("llama3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", "llama"),
    KnownModel("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.1", "mistral"),
    KnownModel("mistral-7b-v0.2", "mistralai/Mistral-7B-Instruct-v0.2", "mistral"),
    KnownModel("mistral-7b-v0.3", "mistralai/Mistral-7B-Instruct-v0.3", "mistral"),
    KnownModel("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", "qwen2"),
    KnownModel("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", "qwen2"),
    KnownModel("qwen2.5-3b", "Qwen/Qwen2.5-3B-Instruct", "qwen2"),
    KnownModel("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", "qwen2"),
    KnownModel("qwen3-0.6b", "Qwen/Qwen3-0.6B", "qwen3"),
    KnownModel("qwen3-1.7b", "Qwen/Qwen3-1.7B", "qwen3"),
    KnownModel("qwen3-4b", "Qwen/Qwen3-4B", "qwen3"),
    KnownModel("qwen3-8b", "Qwen/Qwen3-8B", "qwen3"),
)

HUB_SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja")
HUB_FILES = ("*.safetensors", *HUB_SETTINGS)
# Files of a model folder, besides the weights, that shape what it computes: settings and tokenizer, at the top and in
# the folders of sentence-transformers' modules.
SHAPING_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "modules.json",
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "[0-9]*_*/config.json",
)
# What shapes a model whose size is asked for before it is downloaded: of its config.json, as its makers published it.
_SHAPES = Path(__file__).parent / "shapes"
_INDEX = "model.safetensors.index.json"
_AUTO_GPTQ = "quantize_config.json"  # where AutoGPTQ's settings stood before config.json had them
# What tells whether a model can be served, read before its weights are downloaded.
_FIRST_FILES = ("config.json", _INDEX, _AUTO_GPTQ)
HUB_IGNORED = (
    "consolidated*",
    "original/*",
    "onnx/*",
    "openvino/*",
)  # the same weights again, in other shapes


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files lie and what they are.

    Fields: `name` (the short name of a known model, else as given), `path` (folder, or .gguf file), `format`
    ("safetensors" or "gguf"), `files` (the weight files, in order), `origin` (in words), `weights_sha256` (of the one
    weight file; of several, the sha256 of the lines `sha256sum` prints for them), `sha256` (of all that shapes a
    result: weights, settings, tokenizer), `quantization` (None or GGUF's name for it), `known` (of a known model).
    """

    name: str
    path: Path
    format: str
    files: tuple[Path, ...]
    origin: str
    weights_sha256: str
    sha256: str
    quantization: str | None = None
    known: KnownModel | None = None

    def describe(self) -> str:
        """One line: name, origin, file, hash, quantisation."""
        first = self.files[0].name
        files = first if len(self.files) == 1 else f"{first} and {len(self.files) - 1} more"
        kind = f"quantised {self.quantization} (dequantised to float32)" if self.quantization else "not quantised"
        return f"{self.name}: {self.origin}, {files}, sha256 {self.sha256[:8]}..., {kind}"


def resolve_model(name_or_dir: str | os.PathLike) -> ModelSource:
    """Finds a model's files by name, in the order that the module's docstring gives, and hashes them.

    Raises UserError for an unknown name or folder, a folder without config.json or weights, a file with a
    wrong hash, a truncated GGUF file, and a model that neither a package nor the hub can give.
    """
    name = os.fspath(name_or_dir)
    if not name.strip():
        raise UserError(f"the model name is empty: pass a folder or one of {_short_names()}")
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(name, path, origin="local folder")
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name} is neither a folder nor a .gguf file: pass the folder that holds it")
        return _from_gguf(name, path, origin="local file")
    known = _known_model(name)
    if known is None:
        return _from_hub(name, name)
    tables.table_for(known.model_type, name)
    return replace(_from_package(known.short) or _from_hub(known.short, known.hub), known=known)


def resolve_settings(name_or_dir: str | os.PathLike) -> ModelSource:
    """`resolve_model` for its settings and tokenizer alone: weights are neither looked for nor fetched.

    A folder needs no more than config.json. Of the hub's cache any files are taken; else a model of the folder shapes/
    is known well enough, and of others the small files are fetched. Its `files` and hashes are empty.

    Raises UserError as `resolve_model`.
    """
    name = os.fspath(name_or_dir)
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return _settings_in(name, path, "local folder")
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(name, path, "gguf", (path,), "local file", "", "")
    if not name.strip() or path.exists():
        return resolve_model(name)  # which says what is wrong
    known = _known_model(name)
    if known and (packaged := _from_package(known.short)):
        return replace(packaged, known=known)
    hub_name = known.hub if known else name
    if folder := _cached_settings(hub_name):
        return replace(_settings_in(name, folder, f"hub {hub_name}@{folder.name[:8]}"), known=known)
    if known and (shape := _SHAPES / known.short).is_dir():
        return ModelSource(name, shape, "safetensors", (), f"hub {hub_name}, not here", "", "", known=known)
    return replace(_settings_in(name, _snapshot(name, hub_name, HUB_SETTINGS), f"hub {hub_name}"), known=known)


def _settings_in(name: str, folder: Path, origin: str) -> ModelSource:
    _check_settings(folder)
    return ModelSource(name, folder, "safetensors", (), origin, "", "")


def _cached_settings(hub_name: str) -> Path | None:
    """The folder of a model's files in the hub's cache, if its config.json is there."""
    import huggingface_hub

    try:
        found = Path(huggingface_hub.snapshot_download(hub_name, local_files_only=True))
    except Exception:  # whatever is wrong with the cache: nothing is there
        return None
    return found if (found / "config.json").is_file() else None


def _known_model(name: str) -> KnownModel | None:
    """None for what may be the hub's. Raises UserError for what is neither."""
    known = next((model for model in KNOWN_MODELS if name in (model.short, model.hub)), None)
    if known is None and _is_no_hub_name(name):
        raise UserError(
            f"{name!r} is not a folder, a .gguf file or a known model: check the path, pass a hub name "
            f"(owner/model), or choose one of {_short_names()}"
        )
    return known


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder: model.safetensors, or all that model.safetensors.index.json names,
    sorted.

    Raises UserError when there are none, the index is unusable, or a file that it names is missing.
    """
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.is_file():
        return (single,)
    if not index.is_file():
        raise UserError(f"{folder} has no model.safetensors: {_what_else(folder)}")
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map: download or copy it again")
    shards = sorted(set(map(str, names.values())))
    for shard in shards:
        if Path(shard).name != shard:
            raise UserError(f"{index} names {shard!r}, which is not in its folder: download or copy it again")
        if not (folder / shard).is_file():
            raise UserError(f"{folder / shard} is missing, and {index.name} names it: download or copy it again")
    return tuple(folder / shard for shard in shards)


def _check_settings(folder: Path, hub_name: str | None = None) -> None:
    """Refuses a model type that is not supported, and weights that another tool has quantised."""
    config = read_json_object(folder / "config.json")
    tables.table_for(config.get("model_type"), hub_name or folder / "config.json")
    method = _quantization_method(config)
    if method is None and (folder / _INDEX).is_file():
        names = read_json_object(folder / _INDEX).get("weight_map")
        method = tables.quantisation_of(names if isinstance(names, Mapping) else ())
    if method is None and (folder / _AUTO_GPTQ).is_file():
        method = "gptq"
    if method is not None:
        raise UserError(tables.quantised_message(hub_name or folder, method))


def _quantization_method(config: Mapping[str, Any]) -> str | None:
    """What config.json says that quantised the weights, or None."""
    for field in ("quantization_config", "compression_config", "quantization"):  # compressed-tensors' and MLX's own
        settings = config.get(field)
        if settings and not isinstance(settings, Mapping):
            return str(settings)
        if settings and settings.get("quant_method"):
            return str(settings["quant_method"])
        if settings and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
            return "bitsandbytes"
        if settings:
            return {"compression_config": "compressed-tensors", "quantization": "mlx"}.get(field, f"unnamed, {field}")
    return None


def _short_names() -> str:
    return ", ".join(model.short for model in KNOWN_MODELS)


def _is_no_hub_name(name: str) -> bool:
    return name.count("/") != 1 or name.endswith(("/", ".gguf")) or name.startswith((".", "/", "~"))


def _what_else(folder: Path) -> str:
    if found := sorted(folder.glob("*.gguf")):
        return f"pass the file {found[0]} itself"
    if found := sorted(folder.glob("*.bin")) or sorted(folder.glob("*.pt*")):
        return f"{found[0].name} is a pickle, which is never loaded; save the model again as safetensors"
    return "pass a folder with the model's weights"


def _from_folder(name: str, folder: Path, origin: str, weights_sha256: str | None = None) -> ModelSource:
    if not (folder / "config.json").is_file():
        gguf_files = sorted(folder.glob("*.gguf"))
        mend = f"pass the file {gguf_files[0]} itself" if gguf_files else "pass a Hugging Face model folder"
        raise UserError(f"{folder} has no config.json: {mend}")
    _check_settings(folder)
    files = weight_files(folder)
    weights_sha256 = weights_sha256 or (sha256_file(files[0]) if len(files) == 1 else _listing_sha256(folder, files))
    shaping = sorted({path for pattern in SHAPING_FILES for path in folder.glob(pattern) if path.is_file()})
    whole = hashlib.sha256(f"{weights_sha256} {_listing_sha256(folder, shaping)}".encode()).hexdigest()
    return ModelSource(name, folder, "safetensors", files, origin, weights_sha256, whole)


def _from_gguf(name: str, path: Path, origin: str, sha256: str | None = None) -> ModelSource:
    from ragjax.weights import gguf  # reads its own package, which a safetensors model does not need

    kind = gguf.quantization(gguf.read_gguf(path))
    files = gguf.part_files(path)
    whole = len(files) == 1
    sha256 = sha256 or (sha256_file(path) if whole else _listing_sha256(path.parent, files))  # they hold everything
    return ModelSource(name, files[0], "gguf", files, origin, sha256, sha256, kind)


def _listing_sha256(folder: Path, files: Sequence[Path]) -> str:
    """The sha256 of the lines that `sha256sum` prints for files below `folder`."""
    lines = "".join(f"{sha256_file(file)}  {file.relative_to(folder).as_posix()}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _from_package(short: str) -> ModelSource | None:
    """The source in an installed weight package or joined from several, or None when there is none."""
    for package in PACKAGES:
        if package.short == short and (weights := installed_file(package)):
            origin = f"package {package.distribution} {metadata.version(package.distribution)}"
            if weights.suffix == ".gguf":
                return _from_gguf(short, weights, origin, package.sha256)
            return _from_folder(short, weights.parent, origin, package.sha256)
    for model in SLICED:
        if model.short == short and (folder := joined_folder(model)):
            return _from_folder(short, folder, f"packages {model.packages}", model.sha256)
    return None


def _from_hub(name: str, hub_name: str) -> ModelSource:
    """The source in the hub's cache, downloaded when it is not there."""
    folder = _snapshot(name, hub_name, _FIRST_FILES)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{hub_name} has no config.json on the hub: choose a repository that holds a whole model, or download one "
            "of its .gguf files and pass that"
        )
    _check_settings(folder, hub_name)
    folder = _snapshot(name, hub_name, HUB_FILES)
    try:
        weight_files(folder)
    except UserError as error:
        raise UserError(
            f"the copy of {hub_name} in the hub's cache is incomplete ({error}): go online to download the rest, or "
            "choose a repository with safetensors weights"
        ) from error
    return _from_folder(name, folder, origin=f"hub {hub_name}@{folder.name[:8]}")


def _snapshot(name: str, hub_name: str, files: tuple[str, ...]) -> Path:
    import huggingface_hub  # only where a name is not served locally: half a second

    try:
        found = huggingface_hub.snapshot_download(
            hub_name, allow_patterns=list(files), ignore_patterns=list(HUB_IGNORED)
        )
    except Exception as error:  # its own errors, its HTTP library's, the system's: all mean "not from there"
        raise UserError(_hub_failure(name, hub_name, error)) from error
    return Path(found)


def _hub_failure(name: str, hub_name: str, error: Exception) -> str:
    from huggingface_hub import errors

    packages = [
        f"the package {package.distribution} {package.version} is" for package in PACKAGES if package.short == name
    ]
    packages += [f"the packages {model.packages} are" for model in SLICED if model.short == name]
    tried = f"{name!r} is not a local folder"
    mends = ["pass a local folder", f"choose another model (short names: {_short_names()})"]
    if packages:
        tried += f", {packages[0]} not installed"
        mends = ["run `make weights`", "pass a local folder"]
    if isinstance(error, errors.GatedRepoError):
        mends.append("accept its terms on the hub and log in with `hf auth login`")
        return f"{tried}, and {hub_name} is gated on the hub: {' or '.join(mends)}"
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return f"{tried}, and the hub has no model {hub_name}: {' or '.join(mends)}"
    mends.append("go online")
    return (
        f"{tried}, and {hub_name} was found neither on the hub nor in its cache ({reason(error)}): {' or '.join(mends)}"
    )
