"""What a sentence-transformers folder says beside the encoder itself: how texts become vectors.

    modules.json                          which modules, in which order
    sentence_bert_config.json             longest text, lower-casing; of the encoder
    tokenizer_config.json                 longest text where the file above has none
    1_Pooling/config.json                 the pooling
    2_Normalize/config.json               what is normalised
    config_sentence_transformers.json     prompts, similarity

Notable choices
- Every key that shapes a vector is followed or refused by name, in the layouts of versions 2 to 6 (docs/models.md has
  the table). A key that no version writes into the encoder's or the pooling's file is refused: it may shape vectors.
- Vectors always get unit length, so the inner product is the cosine. Where a folder asks for less or for something
  else, that is said once, when the model is loaded.
- Prompts are chosen as the library's `encode_query`, `encode_document` and `encode` choose them, but a "passage" or
  "corpus" prompt is found whether or not there is a "document" prompt.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragjax.errors import UserError
from ragjax.files import read_json, read_settings
from ragjax.models.encoders import POOLINGS
from ragjax.settings import Settings
from ragjax.weights.resolve import ModelSource

MODULES_FILE = "modules.json"
PROMPTS_FILE = "config_sentence_transformers.json"
# The encoder's file is named after its first user's architecture; the library takes the first that is there.
_ENCODERS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
ENCODER_FILES = tuple(f"sentence_{name}_config.json" for name in _ENCODERS)

# Keys of the encoder's file that have but one supported value. One that is left out or null is taken to say the same.
_ONE_VALUE: dict[str, Any] = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
    "query_length": None,
    "document_length": None,
    "query_expansion": None,
    "tokenizer_name_or_path": None,
    "processing_kwargs": {},
    "model_args": {},
    "model_kwargs": {},
    "tokenizer_args": {},
    "processor_kwargs": {},
    "config_args": {},
    "config_kwargs": {},
}
# What may stand in those all the same: how the library runs a model, not what it computes.
_RUNTIME = {"trust_remote_code", "attn_implementation", "torch_dtype", "dtype", "add_pooling_layer"}
POOLING_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# What is followed, or refused by name, in each file.
ENCODER_KEYS = ("max_seq_length", "do_lower_case", *_ONE_VALUE)
TOKENIZER_KEYS = ("model_max_length", "max_len", "truncation_side")
POOLING_KEYS = (*POOLING_SWITCHES, "pooling_mode", "include_prompt")
NORMALIZE_KEYS = ("module_input_name", "module_output_name")
PROMPT_KEYS = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim", "model_type")
# What changes nothing here.
_WITHOUT_EFFECT = ("unpad_inputs", "word_embedding_dimension", "embedding_dimension")
_MODULES = ("Transformer", "Pooling", "Normalize", "Dropout")
_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
_PASSAGE_PROMPTS = ("document", "passage", "corpus")
_SHORTEST = 3  # two special tokens, and one of the text


@dataclass(frozen=True)
class Prefixes:
    """What is put in front of a text before it is tokenised."""

    query: str = ""
    passage: str = ""
    default: str = ""  # where a text is called neither


@dataclass(frozen=True)
class EmbedderSettings:
    """How an embedder makes a vector of a text, and where its folder says so."""

    max_seq_length: int  # tokens with specials; the rest is cut
    truncation_side: str  # where it is cut
    lower_case: bool  # before the tokenizer
    pooling: str  # one of POOLINGS
    prompts: Mapping[str, str]  # by name; those that are used for questions and passages are "query" and "document"
    default_prompt_name: str | None
    modules: tuple[str, ...]  # the classes in modules.json; () without one
    pooling_file: Path | None
    remarks: tuple[str, ...]  # sentences that a user should read once

    @property
    def prefixes(self) -> Prefixes:
        """What stands in front of questions, passages and texts that are neither."""
        default = self.prompts[self.default_prompt_name] if self.default_prompt_name is not None else ""
        return Prefixes(self.prompts["query"], self.prompts["document"], default)


def read_embedder_settings(
    source: ModelSource, longest: int, query_prefix: str | None = None, passage_prefix: str | None = None
) -> EmbedderSettings:
    """The settings of an embedder's folder.

    Args:
      source: from `resolve_model`.
      longest: tokens that the encoder has positions for.
      query_prefix, passage_prefix: what stands in front of questions and passages; None: what the folder says, else
        what is known of the model that a short name stands for.

    Raises:
      UserError: a setting that would change the vectors and is not followed, naming file and key; a file that holds no
        such settings.
    """
    folder = source.path
    modules, pooling_file = _read_modules(folder)
    encoder = read_settings(
        next((folder / name for name in ENCODER_FILES if (folder / name).is_file()), folder / ENCODER_FILES[0])
    )
    _check_encoder(encoder)
    tokenizer = read_settings(folder / "tokenizer_config.json")
    named = read_settings(folder / PROMPTS_FILE)
    if pooling_file is None:
        pooling, include_prompt, remarks = "mean", True, _check_plain(folder)
    else:
        pooling, include_prompt = _read_pooling(pooling_file)
        remarks = _check_similarity(named, folder, "Normalize" in modules)
    prompts, default, unused = _read_prompts(source, named, query_prefix, passage_prefix)
    settings = EmbedderSettings(
        max_seq_length=_longest_text(encoder, tokenizer, longest),
        truncation_side=tokenizer.one_of("truncation_side", "right", "left", "right"),
        lower_case=encoder.boolean("do_lower_case"),
        pooling=pooling,
        prompts=prompts,
        default_prompt_name=default,
        modules=modules,
        pooling_file=pooling_file,
        remarks=(*remarks, *unused),
    )
    if not include_prompt and settings.prefixes != Prefixes():
        raise UserError(
            f"{pooling_file} has include_prompt = false, which pools without the prompt and is not supported: choose "
            "another model, or use no prompts (--query_prefix= and --passage_prefix=, and no default_prompt_name)"
        )
    return settings


# ---- modules -----------------------------------------------------------------------------------------------


def _read_modules(folder: Path) -> tuple[tuple[str, ...], Path | None]:
    """(classes of the modules, the pooling's config.json); ((), None) without modules.json."""
    path = folder / MODULES_FILE
    if not path.is_file():
        return (), None
    modules = read_json(path)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise UserError(f"{path} is no list of modules: download or copy it again")
    found = [(_kind(path, module), module.get("path")) for module in modules]
    # Dropout does nothing to a vector that is not being trained.
    effective = [(kind, name) for kind, name in found if kind != "Dropout"]
    kinds = [kind for kind, _ in effective]
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Normalize"}:
        raise UserError(
            f"{path} asks for the modules {', '.join(kinds)}, but only Transformer, Pooling and then Normalize are "
            "supported: choose another model"
        )
    if effective[0][1]:
        raise UserError(
            f"{path} keeps the encoder in the folder {effective[0][1]!r}, as versions before 2 did: load and save the "
            "model with a newer sentence-transformers"
        )
    pooling, *normalize = (_inside(path, name) for _, name in effective[1:])
    for each in normalize:
        _check_normalize(each / "config.json")
    return tuple(kind for kind, _ in found), pooling / "config.json"


def _kind(path: Path, module: Mapping[str, Any]) -> str:
    """The module's class, Transformer or the like. Raises UserError for one that is not supported."""
    kind = str(module.get("type"))
    package, _, name = kind.rpartition(".")
    ours = package.partition(".")[0] == "sentence_transformers"
    if not ours or name not in _MODULES:
        raise UserError(
            f"{path} asks for a module {kind!r}, but only sentence-transformers' own {', '.join(_MODULES)} are "
            "supported: choose another model"
        )
    return name


def _inside(path: Path, name: Any) -> Path:
    """A module's folder. Raises UserError for a name that could lead elsewhere, where no hash would cover it."""
    if not isinstance(name, str) or not re.fullmatch(r"\d+_\w+", name):
        raise UserError(f"{path} has the path {name!r} where a folder such as '1_Pooling' is expected: rename it")
    return path.parent / name


def _check_normalize(path: Path) -> None:
    settings = read_settings(path)
    for key, value in settings.items():
        if key not in NORMALIZE_KEYS or value not in (None, "sentence_embedding"):
            raise settings.fault(key, ", which is not supported: choose another model")


def _check_plain(folder: Path) -> list[str]:
    """What is said of an encoder by itself. Raises UserError where modules.json is missing among files that need it."""
    names = (PROMPTS_FILE, *ENCODER_FILES, "[0-9]*_Pooling/config.json")
    for path in (path for name in names for path in sorted(folder.glob(name))):
        raise UserError(
            f"{folder} has {path.relative_to(folder)} but no {MODULES_FILE}, which says what is done with it: download "
            "or copy the folder again"
        )
    words = "creating a new sentence encoder with mean pooling and vectors of unit length."
    return [f"no {MODULES_FILE} in {folder}: {words}"]


# ---- the encoder's settings --------------------------------------------------------------------------------


def _check_encoder(settings: Settings) -> None:
    _check_known(settings, ENCODER_KEYS)
    for key, supported in _ONE_VALUE.items():
        value = settings.get(key)
        if supported == {} and isinstance(value, dict):
            value = {name: setting for name, setting in value.items() if name not in _RUNTIME}
        if value is not None and value != supported:
            raise settings.fault(key, f", but only {supported!r} is supported: choose another model")


def _longest_text(encoder: Settings, tokenizer: Settings, longest: int) -> int:
    """The encoder's own number, else the tokenizer's, and never more than there are positions for."""
    # The last of these before 2020.
    for settings, key in ((encoder, "max_seq_length"), (tokenizer, "model_max_length"), (tokenizer, "max_len")):
        if settings.get(key) is not None:
            return int(min(settings.number(key, least=_SHORTEST), longest))
    return longest


# ---- pooling -----------------------------------------------------------------------------------------------


def _read_pooling(path: Path) -> tuple[str, bool]:
    """(pooling, include_prompt): the former in either spelling, one name or switches."""
    if not path.is_file():
        raise UserError(f"{path} is missing, and {MODULES_FILE} names it: download or copy the folder again")
    settings = read_settings(path)
    _check_known(settings, POOLING_KEYS)
    modes = settings.get("pooling_mode")
    if modes is None:
        # Without any that is on, the mean: sentence-transformers 6.2 takes it then, too.
        modes = [mode for key, mode in POOLING_SWITCHES.items() if settings.boolean(key)] or ["mean"]
    modes = modes if isinstance(modes, list) else [modes]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise UserError(
            f"{path} asks for {' and '.join(map(str, modes)) or 'no'} pooling, but only one of {', '.join(POOLINGS)} "
            "is supported: choose another model"
        )
    return modes[0], settings.boolean("include_prompt", True)


# ---- prompts and similarity --------------------------------------------------------------------------------


def _check_similarity(settings: Settings, folder: Path, normalised: bool) -> list[str]:
    """Sentences about what is done otherwise. Raises UserError for a kind of model or of vector that is no such one."""
    settings.one_of("model_type", "SentenceTransformer", "SentenceTransformer")
    if settings.get("truncate_dim") is not None:
        raise settings.fault("truncate_dim", ", which is not supported: set it to null")
    name = settings.one_of("similarity_fn_name", "cosine", *_SIMILARITIES)
    if normalised and name in ("cosine", "dot"):
        return []
    asked = "no unit length" if name == "cosine" else f"the similarity {name!r}"
    return [f"{folder} asks for {asked}; here vectors are scaled to unit length and ranked by cosine."]


def _read_prompts(
    source: ModelSource, settings: Settings, query: str | None, passage: str | None
) -> tuple[dict[str, str], str | None, list[str]]:
    """(prompts by name, the default's name, a sentence where that is used for neither questions nor passages)."""
    given = settings.get("prompts") or {}
    texts = settings.section("prompts")
    prompts = {"query": "", "document": ""} | {name: texts.text(name) or "" for name in given}
    if source.known is not None and not any(prompts.values()):
        prompts |= {"query": source.known.query_prefix, "document": source.known.passage_prefix}
    passage_name = next((name for name in _PASSAGE_PROMPTS if name in given), "document")
    prompts |= {name: text for name, text in (("query", query), (passage_name, passage)) if text is not None}
    prompts["document"] = prompts[passage_name]
    default = settings.text("default_prompt_name")
    if default is None:
        return prompts, None, []
    if default not in prompts:
        raise settings.fault("default_prompt_name", ", but no prompt of that name: add it or set null")
    if default in ("query", passage_name) or not prompts[default] or query is not None or passage is not None:
        return prompts, default, []
    remark = (
        f"the default prompt {default!r} of {source.path} goes with neither questions nor passages: give "
        "--query_prefix and --passage_prefix to put one in front of them."
    )
    return prompts, default, [remark]


# ---- files -------------------------------------------------------------------------------------------------


def _check_known(settings: Settings, keys: tuple[str, ...]) -> None:
    if unknown := sorted(set(settings) - {*keys, *_WITHOUT_EFFECT}):
        raise UserError(f"{settings.where} has {unknown[0]!r}, which this version does not know: choose another model")
