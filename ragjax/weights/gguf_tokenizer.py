"""The tokenizer inside a GGUF file, built for the `tokenizers` library.

tokenizer.ggml.model is "gpt2" (byte-level BPE, whose text is first cut as tokenizer.ggml.pre names it) or "llama"
(SentencePiece's BPE: a "▁" before every text, bytes for what the vocabulary lacks).

Notable choices
- The rules are those of the models' own tokenizer.json, not llama.cpp's: Qwen's composes characters (NFC) first.
- A cut that is not known is refused: with a wrong one most texts would get the right ids, and some would not.
- SentencePiece stores a score for each piece instead of merges. Two parts are merged where that makes the piece of the
  highest score, so the merges are all cuts of all pieces in the order of the scores.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ragjax.errors import UserError, reason
from ragjax.weights.gguf import read_gguf

_SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # values of tokenizer.ggml.token_type
_UNDERSTOOD = {"model", "pre", "tokens", "token_type", "merges", "scores", "add_bos_token", "add_eos_token"}
# Further settings, let through with the value that changes nothing. Ids of other roles are let through, too.
_NEUTRAL = {
    "add_space_prefix": False,  # but for SentencePiece, where it is followed
    "remove_extra_whitespaces": False,
    "escape_whitespaces": True,
    "add_sep_token": False,
    "precompiled_charsmap": [],
    "token_type_count": 1,
}
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Cut(NamedTuple):
    """How a byte-level tokenizer treats a text before it merges.

    Fields: `pattern` of the pieces (None: digits one by one, then GPT-2's), `composes` (NFC first), `whole` (a piece
    that is in the vocabulary is a token, whatever the merges say), `starts` (a first token, where the file does not
    say).
    """

    pattern: str | None = None
    composes: bool = False
    whole: bool = False
    starts: bool = False


_LLAMA3 = Cut(_CONTRACTION + r"\p{N}{1,3}" + _REST, whole=True, starts=True)
_QWEN2 = Cut(_CONTRACTION + r"\p{N}" + _REST, composes=True)
# By tokenizer.ggml.pre.
CUTS = {
    "smollm": Cut(),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def read_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a GGUF file, and the settings that tokenizer_config.json would hold.

    Raises UserError for a kind or a setting that is not followed, and for data that are incomplete.
    """
    metadata = read_gguf(path).metadata
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    cut = CUTS.get(pre) if model == "gpt2" and pre is not None else None
    if model != "llama" and cut is None:
        raise UserError(
            f"{path}: its tokenizer (tokenizer.ggml.model {model!r}, tokenizer.ggml.pre {pre!r}) is not supported, "
            f"only 'llama' and 'gpt2' with {', '.join(map(repr, CUTS))} are: use the model's Hugging Face folder, "
            "which has a tokenizer.json"
        )
    _refuse_unknown_settings(path, metadata, "llama" if cut is None else "gpt2")
    try:
        tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        if cut is None:
            prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
            backend = sentencepiece_backend(tokens, metadata["tokenizer.ggml.scores"], kinds, prefix)
        else:
            merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
            backend = byte_level_backend(tokens, merges, kinds, cut)
        roles = {role: tokens[metadata[key]] for role, key in _SPECIAL.items() if key in metadata}
        starts = metadata.get("tokenizer.ggml.add_bos_token", cut is None or cut.starts)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(
            f"{path}: its tokenizer data are incomplete or damaged ({reason(error)}): download or copy the file again"
        ) from error
    return backend, roles | {
        "add_bos_token": starts,
        "add_eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }


def _refuse_unknown_settings(path: Path, metadata: Mapping[str, Any], model: str) -> None:
    neutral = {name: value for name, value in _NEUTRAL.items() if model != "llama" or name != "add_space_prefix"}
    followed = _UNDERSTOOD | _NEUTRAL.keys() - neutral.keys()
    for key, value in metadata.items():
        name = key.removeprefix("tokenizer.ggml.")
        known = name == key or name in followed or name.endswith(("_token_id", "_token_ids"))
        if not known and neutral.get(name, ...) != value:
            raise UserError(
                f"{path}: the setting {key} = {str(value)[:40]} is not supported: use the model's Hugging Face folder, "
                "which has a tokenizer.json"
            )


def byte_level_backend(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]], kinds: Sequence[int], cut: Cut
) -> Tokenizer:
    """Byte-level BPE; a byte that the vocabulary lacks vanishes.

    Args: `tokens` by id, in GPT-2's byte spelling; `merges`, best first; `kinds`, GGUF's token_type of each token.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), ignore_merges=cut.whole))
    if cut.composes:
        backend.normalizer = normalizers.NFC()
    first = (
        pre_tokenizers.Digits(individual_digits=True)
        if cut.pattern is None
        else pre_tokenizers.Split(Regex(cut.pattern), "isolated")
    )
    second = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.pattern is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, second])
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, tokens, kinds, special=(_CONTROL,))
    return backend


def sentencepiece_backend(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], prefix: bool
) -> Tokenizer:
    """SentencePiece's BPE as LLaMA 2 and Mistral use it: bytes for what the vocabulary lacks.

    Args: `tokens` by id, with "▁" for a blank; `scores` of merging to each, the highest first; `kinds`, GGUF's
    token_type of each; `prefix`, whether every text begins as if a blank stood before it.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    merges = _merges(tokens, scores, kinds, vocabulary)
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    blank = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank]) if prefix else blank
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    _add_tokens(backend, tokens, kinds, special=(_UNKNOWN, _CONTROL))
    return backend


def _merges(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], vocabulary: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Every cut of every piece into two pieces: the piece of the highest score first, its longest left part first."""
    pieces = [entry for entry in zip(tokens, scores, kinds, strict=True) if entry[2] == _NORMAL]
    pieces.sort(key=lambda entry: -entry[1])
    cuts = ((piece[:at], piece[at:]) for piece, _, _ in pieces for at in range(len(piece) - 1, 0, -1))
    return [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]


def _add_tokens(backend: Tokenizer, tokens: Sequence[str], kinds: Sequence[int], special: tuple[int, ...]) -> None:
    typed = list(zip(tokens, kinds, strict=True))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in typed if kind in special])
    backend.add_tokens([AddedToken(t, normalized=False) for t, kind in typed if kind == _USER_DEFINED])
