"""Tokenizers without torch: from a folder's tokenizer.json or from a GGUF file's own data.

Notable choices
- Text is only ever text: the strings of special tokens inside it are cut up like any other
  (`split_special_tokens`). A chat template's own pieces want the opposite; tokenise them with
  `tokenizer(piece, split_special_tokens=False)`.
- The truncation and padding stored in tokenizer.json are dropped: callers say how long, and masks come from
  lengths.
- `eos_token_id` is the one token that ends an answer in training, so it is always one at which generation
  stops.
- transformers takes a second to import and is imported in the functions that need it.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from ragjax.errors import UserError, reason
from ragjax.files import read_json_object
from ragjax.weights import wordpiece
from ragjax.weights.load import read_config
from ragjax.weights.resolve import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_GGUF_SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def load_tokenizer(source: ModelSource, config: Mapping[str, Any] | None = None) -> "PreTrainedTokenizerFast":
    """The tokenizer of a model.

    Args: `source`, from `resolve_model`; `config`, from `read_config` (read again when None): its vocabulary
    size and end ids. Raises UserError when there is no tokenizer, it is damaged, it does not fit the model's
    vocabulary, or a GGUF file splits text in a way that is not supported.
    """
    config = read_config(source) if config is None else config
    backend, settings = (
        _from_gguf(source.path) if source.format == "gguf" else _from_folder(source.path, config["model_type"])
    )
    backend.no_truncation()
    backend.no_padding()
    largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config["vocab_size"]:
        raise UserError(
            f"the tokenizer in {source.path} has the token id {largest}, but the model's vocabulary ends at "
            f"{config['vocab_size'] - 1}: use the tokenizer that belongs to this model"
        )
    settings["eos_token"] = _end_token(backend, settings.get("eos_token"), config, source.path)
    for role in _SPECIAL:
        token = settings.get(role)
        if token is not None and backend.token_to_id(token) is None:  # transformers would add it behind the vocabulary
            raise UserError(
                f"{source.path}: the {role} {token!r} is not in the tokenizer's vocabulary: use the "
                "tokenizer that belongs to this model"
            )
    with _no_advice():
        from transformers import PreTrainedTokenizerFast
    settings = {name: value for name, value in settings.items() if value is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, split_special_tokens=True, clean_up_tokenization_spaces=False, **settings
    )


@contextmanager
def _no_advice() -> Iterator[None]:
    """Silences transformers' remark, made at its import, that models need PyTorch: here they do not."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _end_token(backend: Tokenizer, own: str | None, config: Mapping[str, Any], where: Path) -> str | None:
    """The tokenizer's own end token if generation stops at it, else the model's first one; None without any."""
    ends = config["end_token_ids"]
    if not ends or (own is not None and backend.token_to_id(own) in ends):
        return own
    if backend.id_to_token(ends[0]) is None:
        raise UserError(
            f"{where}: the end token id {ends[0]} is not in the tokenizer's vocabulary: use the tokenizer that "
            "belongs to this model"
        )
    return backend.id_to_token(ends[0])


def _from_folder(folder: Path, model_type: str) -> tuple[Tokenizer, dict[str, Any]]:
    settings, config = _folder_settings(folder)
    path = folder / "tokenizer.json"
    if not path.is_file() and (folder / "vocab.txt").is_file() and model_type in wordpiece.MODEL_TYPES:
        backend, specials = wordpiece.from_vocabulary(folder, model_type, config, settings)
        return backend, settings | specials
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json: add the one that belongs to this model")
    read_json_object(path)  # its errors name the file; what follows is about the content
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is not a tokenizer ({reason(error)}): download or copy it again") from error
    if wordpiece.is_wordpiece(model_type, config):
        wordpiece.follow_settings(backend, config, folder / "tokenizer_config.json")
    return backend, settings


def _folder_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(special tokens by role and the chat template, tokenizer_config.json)."""
    settings: dict[str, Any] = {}
    content: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the later one wins
        content = read_json_object(folder / name) if (folder / name).is_file() else {}
        tokens = {role: content.get(role) for role in _SPECIAL}
        settings |= {role: _text(token) for role, token in tokens.items() if token is not None}
        template = content.get("chat_template", settings.get("chat_template"))
        if template is not None:
            settings["chat_template"] = _template(template)
    if (folder / "chat_template.jinja").is_file():  # where transformers writes it since 4.52
        settings["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return settings, content


def _text(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else token


def _template(template: str | list[dict[str, str]]) -> str | dict[str, str]:
    return template if isinstance(template, str) else {entry["name"]: entry["template"] for entry in template}


def _from_gguf(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    from ragjax.weights import gguf

    metadata = gguf.read_gguf(path).metadata
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if (kind, split) != ("gpt2", "smollm"):
        raise UserError(
            f"{path}: its tokenizer (tokenizer.ggml.model {kind!r}, tokenizer.ggml.pre {split!r}) is not "
            "supported, only 'gpt2' with 'smollm' is: use the model's Hugging Face folder, which has a "
            "tokenizer.json"
        )
    try:
        tokens = metadata["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        backend = smollm_backend(tokens, merges, metadata["tokenizer.ggml.token_type"])
        settings = {role: tokens[metadata[key]] for role, key in _GGUF_SPECIAL.items() if key in metadata}
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(
            f"{path}: its tokenizer data are incomplete or damaged ({reason(error)}): download or copy the file again"
        ) from error
    for name in ("add_bos_token", "add_eos_token"):
        if metadata.get(f"tokenizer.ggml.{name}"):
            settings[name] = True
    return backend, settings | {"chat_template": metadata.get("tokenizer.chat_template")}


def smollm_backend(tokens: list[str], merges: list[tuple[str, str]], kinds: list[int]) -> Tokenizer:
    """SmolLM's byte-level BPE: digits stand alone, then GPT-2's split; a byte that the vocabulary lacks vanishes.

    Args: `tokens` by id, in GPT-2's byte spelling; `merges`, best first; `kinds`, GGUF's token_type of each token.
    """
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    typed = list(zip(tokens, kinds, strict=True))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in typed if kind == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, kind in typed if kind == _USER_DEFINED])
    return backend
