"""Tokenizers without torch: from a folder's tokenizer.json or from a GGUF file's own data.

Notable choices
- Text is only ever text: the strings of special tokens inside it are cut up like any other
  (`split_special_tokens`). A chat template's own pieces want the opposite; tokenise them with
  `tokenizer(piece, split_special_tokens=False)`.
- The truncation and padding stored in tokenizer.json are dropped: callers say how long, and masks come from
  lengths.
- Special tokens may lie beyond the model's vocabulary, as many fine-tunes add a padding token there: text never becomes
  one, and ragjax pads by length. Roles that are fed, and tokens that text can become, may not.
- How text is cut is tokenizer.json's to say. tokenizer_config.json gives roles, tokens that tokenizer.json lacks,
  whether a first and a last token are put around a text, and the chat template.
- `eos_token_id` is the one token that ends an answer in training, so it is always one at which generation
  stops.
- transformers takes a second to import and is imported in the functions that need it.
"""

import os
from collections.abc import Generator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, processors

from ragjax.errors import UserError, reason
from ragjax.files import read_json_object, read_settings, read_text
from ragjax.settings import Settings
from ragjax.weights import wordpiece
from ragjax.weights.load import check_token_ids, read_config
from ragjax.weights.resolve import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OTHER_FORMS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
_AROUND = {"add_bos_token": "bos_token", "add_eos_token": "eos_token"}


def load_tokenizer(source: ModelSource, config: Mapping[str, Any] | None = None) -> "PreTrainedTokenizerFast":
    """The tokenizer of a model.

    Args: `source`, from `resolve_model`; `config`, from `read_config` (read again when None): its vocabulary
    size and end ids. Raises UserError when there is no tokenizer, it is damaged, it does not fit the model's
    vocabulary, or a GGUF file splits text in a way that is not supported.
    """
    config = read_config(source) if config is None else config
    check_token_ids(source, config["vocab_size"])
    if source.format == "gguf":
        from ragjax.weights import gguf_tokenizer

        backend, settings = gguf_tokenizer.read_tokenizer(source.path)
    else:
        backend, settings = _from_folder(source, config["model_type"])
    backend.no_truncation()
    backend.no_padding()
    _surround(backend, settings)
    settings["eos_token"] = _end_token(backend, settings.get("eos_token"), config, source.path)
    _check_vocabulary(backend, settings, config["vocab_size"], source.path)
    with _no_advice():
        from transformers import PreTrainedTokenizerFast
    settings = {name: value for name, value in settings.items() if value is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, split_special_tokens=True, clean_up_tokenization_spaces=False, **settings
    )


def _surround(backend: Tokenizer, settings: dict[str, Any]) -> None:
    """Makes the default encoding put a first and a last token around a text where the settings say so or say not.

    What they say replaces what tokenizer.json does, as in transformers.
    """
    wishes = {name: settings.pop(name, None) for name in _AROUND}
    if all(wish is None for wish in wishes.values()):
        return
    first, last = (settings.get(role) if wishes[name] else None for name, role in _AROUND.items())
    pieces = [
        token for token in (first, "$A", last) if token == "$A" or (token and backend.token_to_id(token) is not None)
    ]
    ids = {token: backend.token_to_id(token) for token in pieces if token != "$A"}
    backend.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=list(ids.items()))


def _check_vocabulary(backend: Tokenizer, settings: dict[str, Any], size: int, where: Path) -> None:
    """Refuses ids beyond the model's vocabulary that could be fed, and takes back a padding token beyond it."""
    added = backend.get_added_tokens_decoder()
    specials = {token.content for token in added.values() if token.special}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    largest = max((index for token, index in vocabulary.items() if token not in specials), default=-1)
    largest = max(largest, *backend.encode("a").ids, -1)
    if largest >= size:
        raise UserError(
            f"the tokenizer in {where} has the token id {largest}, but the model's vocabulary ends at {size - 1}: use "
            "the tokenizer that belongs to this model"
        )
    for role in _SPECIAL:
        token = settings.get(role)
        if token is None or vocabulary.get(token, size) < size:
            continue
        if role != "pad_token":
            raise UserError(
                f"{where}: the {role} {token!r} is not in the tokenizer's vocabulary, or beyond the model's: use the "
                "tokenizer that belongs to this model"
            )
        settings[role] = None


@contextmanager
def _no_advice() -> Generator[None, None, None]:
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


def _from_folder(source: ModelSource, model_type: str) -> tuple[Tokenizer, dict[str, Any]]:
    folder = source.path
    settings, config = _folder_settings(folder)
    path = folder / "tokenizer.json"
    if not path.is_file() and (folder / "vocab.txt").is_file() and model_type in wordpiece.MODEL_TYPES:
        backend, specials = wordpiece.from_vocabulary(folder, model_type, config, settings)
        return backend, settings | specials
    if not path.is_file():
        raise UserError(_no_tokenizer(source))
    read_json_object(path)  # its errors name the file; what follows is about the content
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is not a tokenizer ({reason(error)}): download or copy it again") from error
    if wordpiece.is_wordpiece(model_type, config):
        wordpiece.follow_settings(backend, config)
    try:
        _add_missing(backend, config, {token for role, token in settings.items() if role in _SPECIAL}, folder)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder}: added_tokens_decoder of tokenizer_config.json, or added_tokens.json, is damaged "
            f"({reason(error)}): download or copy it again"
        ) from error
    return backend, settings | {name: config.boolean(name, None) for name in _AROUND}


def _no_tokenizer(source: ModelSource) -> str:
    """Why a folder without tokenizer.json is refused."""
    if other := next((name for name in _OTHER_FORMS if (source.path / name).is_file()), None):
        return (
            f"{source.path} has {other} but no tokenizer.json, which is the form that is read: load and save the "
            "tokenizer once with transformers, which writes it"
        )
    mend = "go online to download the rest" if source.origin.startswith("hub") else "add the one of this model"
    return f"{source.path} has no tokenizer.json: {mend}"


def _folder_settings(folder: Path) -> tuple[dict[str, Any], Settings]:
    """(special tokens by role and the chat template, tokenizer_config.json)."""
    older, config = (read_settings(folder / name) for name in ("special_tokens_map.json", "tokenizer_config.json"))
    settings: dict[str, Any] = {}
    for content in (older, config):  # the later one wins
        tokens = {role: _special_token(content, role) for role in _SPECIAL}
        settings |= {role: token for role, token in tokens.items() if token is not None}
        if content.get("chat_template") is not None:
            settings["chat_template"] = _template(content)
    if (folder / "chat_template.jinja").is_file():  # where transformers writes it since 4.52
        settings["chat_template"] = read_text(folder / "chat_template.jinja")
    return settings, config


def _add_missing(backend: Tokenizer, config: Settings, roles: Set[str], folder: Path) -> None:
    """Adds the tokens that only tokenizer_config.json or added_tokens.json has, with the ids that they give.

    The latter does not say which are special: those with a role are.
    """
    older = read_settings(folder / "added_tokens.json")
    tokens = {older.integer(text, least=0): AddedToken(text, special=text in roles, normalized=False) for text in older}
    added = config.section("added_tokens_decoder")
    for index in added:
        token = added.section(index)
        options = {name: token.boolean(name) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}
        tokens[int(index)] = AddedToken(token["content"], **options)
    for index, token in sorted(tokens.items()):
        if backend.token_to_id(token.content) is None:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
            if backend.token_to_id(token.content) != index:
                raise UserError(
                    f"{folder}: tokenizer_config.json or added_tokens.json gives {token.content!r} the id {index}, "
                    "which tokenizer.json leaves no room for: use the tokenizer that belongs to this model"
                )


def _special_token(settings: Settings, role: str) -> str | None:
    """The token of a role, which stands there as text or as an object with its "content"."""
    if isinstance(settings.get(role), Mapping):
        return settings.section(role).text("content")
    return settings.text(role)


def _template(settings: Settings) -> str | dict[str, str]:
    """The chat template, or several of them by name."""
    template = settings["chat_template"]
    if not isinstance(template, list):
        return settings.text("chat_template") or ""
    try:
        return {entry["name"]: entry["template"] for entry in template}
    except (KeyError, TypeError):
        raise UserError(
            f'{settings.where} has a chat_template that is no text and no list of {{"name", "template"}}: download or '
            "copy it again"
        ) from None
