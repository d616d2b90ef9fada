"""BERT's and MPNet's WordPiece tokenizers: from a vocab.txt alone, and what tokenizer_config.json changes in them.

Notable choice: transformers builds these two tokenizers from tokenizer_config.json, and what it says of letter case,
accents and Chinese characters goes before what tokenizer.json says. The same holds here, so that vectors are equal.
"""

from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ragjax.errors import UserError, reason
from ragjax.files import read_settings
from ragjax.settings import Settings

# model_type -> the special tokens that its tokenizer has where tokenizer_config.json names none.
_SPECIALS = {
    "bert": {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    "mpnet": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "[UNK]",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "cls_token": "<s>",
        "mask_token": "<mask>",
    },
}
_CLASSES = {"bert": "BertTokenizer", "mpnet": "MPNetTokenizer"}
MODEL_TYPES = tuple(_CLASSES)
# Settings of the text's normalisation and what they are where they are left out (None: as do_lower_case).
NORMALISATION = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}


def is_wordpiece(model_type: str, config: Settings) -> bool:
    """Whether a model's tokenizer is of the class that transformers builds for its type."""
    named = str(config.text("tokenizer_class") or _CLASSES.get(model_type)).removesuffix("Fast")
    return model_type in _CLASSES and named == _CLASSES[model_type]


def follow_settings(backend: Tokenizer, config: Settings) -> None:
    """Gives a tokenizer of this class the normalisation that its tokenizer_config.json asks for.

    Raises UserError, naming that file, for a setting that is neither true nor false.
    """
    # Another normaliser says by itself what is done, and no version of transformers changes it by these settings.
    if isinstance(backend.normalizer, normalizers.BertNormalizer):
        backend.normalizer = _normalizer(config)


def lower_case_first(backend: Tokenizer) -> None:
    """Makes a tokenizer of any class lower-case its text before all else."""
    own = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])


def from_vocabulary(
    folder: Path, model_type: str, config: Settings, named: Mapping[str, str]
) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a folder with vocab.txt but no tokenizer.json, and its special tokens by role.

    Args: `config`, tokenizer_config.json; `named`, the special tokens that the folder names, by role. Raises UserError
    when the file is damaged, lacks a special token, or the tokenizer is of another class.
    """
    path = folder / "vocab.txt"
    if not is_wordpiece(model_type, config):
        raise UserError(
            f"{folder} has no tokenizer.json, and from vocab.txt alone only a {_CLASSES[model_type]} is made, not a "
            f"{config.get('tokenizer_class')}: load and save the tokenizer once with transformers"
        )
    specials = {role: named.get(role, token) for role, token in _SPECIALS[model_type].items()}
    try:
        vocabulary = models.WordPiece.read_file(str(path))
        backend = Tokenizer(models.WordPiece(vocabulary, unk_token=specials["unk_token"]))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is no vocabulary ({reason(error)}): download or copy it again") from error
    for role in ("cls_token", "sep_token", "unk_token"):
        if specials[role] not in vocabulary:
            raise UserError(f"{path} lacks the {role} {specials[role]!r}: use the one that belongs to this model")
    backend.normalizer = _normalizer(config)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    first, last = specials["cls_token"], specials["sep_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(token, vocabulary[token]) for token in (first, last)],
    )
    specials = {role: token for role, token in specials.items() if token in vocabulary}
    _add_tokens(backend, folder, config)
    backend.add_special_tokens([AddedToken(token, special=True) for token in dict.fromkeys(specials.values())])
    return backend, specials


def _normalizer(config: Settings) -> normalizers.BertNormalizer:
    settings = {key: config.boolean(key, default) for key, default in NORMALISATION.items()}
    return normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings["tokenize_chinese_chars"],
        strip_accents=settings["strip_accents"],
        lowercase=settings["do_lower_case"],
    )


def _add_tokens(backend: Tokenizer, folder: Path, config: Settings) -> None:
    """Adds what stands behind the vocabulary, in added_tokens.json or in tokenizer_config.json.

    Raises UserError where an id is not the next one: the tokens between would be missing.
    """
    path = folder / "added_tokens.json"
    older = read_settings(path)
    added = {text: older.integer(text, least=0) for text in older}
    if isinstance(more := config.get("added_tokens_decoder"), dict):
        path = folder / "tokenizer_config.json"
        added |= {entry["content"]: int(number) for number, entry in more.items()}
    for token, number in sorted(added.items(), key=lambda item: item[1]):
        backend.add_tokens([AddedToken(token, normalized=False)])
        if backend.token_to_id(token) != number:
            raise UserError(
                f"{path} gives the token {token!r} the id {number}, but beside this vocab.txt it is "
                f"{backend.token_to_id(token)}: use the files that belong together"
            )
