"""The configuration of a run: one frozen dataclass, whose fields are also the commands' flags.

Each field carries its help text and what it may hold, so a flag, its default, its bounds and the table in
docs/defaults.md have one source. No configuration exists with a value that cannot be meant: making one raises
UserError. Reasons and evidence for the defaults stand in that table.
"""

import dataclasses
import enum
import math
import numbers
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ragjax.errors import UserError


class Strategy(enum.StrEnum):
    """What is trained, in which order: training/strategies.py has the phases of each, and what `auto` picks."""

    NONE = enum.auto()
    GENERATOR = enum.auto()
    JOINT = enum.auto()
    EMBEDDER = enum.auto()
    INDEPENDENT = enum.auto()
    TWO_PHASE = enum.auto()
    AUTO = enum.auto()


OBJECTIVES = ("rag_token", "rag_sequence", "concat_nll")
RETRIEVER_OBJECTIVES = ("marginal", "emdr2", "pdist", "replug_lsr", "loop")
NEGATIVE_FILTERS = ("labels", "gist")
QUANTIZE = ("int8", "nf4")
REMAT = ("none", "partial", "full")
KEEP = ("best", "last")
DECODERS = ("concat", "rag_token", "rag_sequence", "none")
DECODE_VARIANTS = ("thorough", "fast")


# The linear layers of a decoder, all of which can carry an adapter.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class _Range:
    """Finite numbers from `minimum` (or `above` it) to `maximum` (or `below` it)."""

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = {"above": self.above, "at least": self.minimum, "at most": self.maximum, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)


def _field(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    kind: type | None = None,
    items: tuple[str, ...] | type | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with its flag and what it may hold.

    kind: needed where the default is None.
    items: of a tuple: what to choose from, or the kind of its (positive) numbers.
    minimum, above, maximum, below: of a number, or of a tuple's numbers.
    """
    metadata = {"help": help, "choices": choices, "kind": kind or type(default), "items": items}
    metadata["range"] = _Range(minimum, above, maximum, below)
    return dataclasses.field(default=default, metadata=metadata)


class _Checked:
    """A configuration whose values are checked, and brought to their fields' types, when it is made.

    A tuple may be given as a list, as one value, or as text with commas, which is what a flag and the config.json of an
    older run hold.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                object.__setattr__(self, field.name, _checked(field, value))


_KINDS = {int: numbers.Integral, float: numbers.Real, bool: bool, str: str | os.PathLike}
_KIND_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """The value as the field holds it. Raises UserError where it cannot be meant."""
    name, rules = field.name, field.metadata
    kind = rules["kind"]
    if rules["items"]:
        return _checked_items(field, value)
    if not isinstance(value, _KINDS[kind]) or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"--{name}={value} is not {_KIND_NAMES[kind]}.")
    value = kind(value)
    if rules["choices"] and value not in rules["choices"]:
        known = ", ".join(filter(None, rules["choices"]))
        raise UserError(f"--{name}={value} is not known: choose from {known}.")
    if kind in (int, float) and value not in rules["range"]:
        raise UserError(f"--{name}={value:g} is out of range: give a number {rules['range']}.")
    return value


def _checked_items(field: dataclasses.Field, value: Any) -> tuple:
    """The items, each once. Raises UserError for one that may not be there."""
    name, items, text = field.name, field.metadata["items"], flag_text(value)
    if not (text or field.default):
        return ()
    try:
        found = as_items(value, items)
    except (TypeError, ValueError):
        found = (math.nan,)
    if isinstance(items, tuple):
        if unknown := [item for item in found or ("",) if item not in items]:
            raise UserError(f"--{name}={unknown[0]} is not known: choose from {', '.join(items)}.")
    elif not found or not all(item in field.metadata["range"] for item in found):
        example = "1,5,10" if items is int else "1e-6,3e-6,1e-5"
        raise UserError(f"--{name}={text} is not a list of positive numbers: write it as {example}.")
    return found


def as_items(value: Any, items: tuple[str, ...] | type) -> tuple:
    """A tuple from a list, one value or text with commas, in order and each item once, without blanks around it.

    Raises ValueError or TypeError where an item is no number of the kind `items`.
    """
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    elif not isinstance(value, Iterable):
        value = [value]
    return tuple(dict.fromkeys(item if isinstance(items, tuple) else _number(item, items) for item in value))


def _number(item: Any, kind: type) -> Any:
    number = kind(item)
    if not isinstance(item, str) and number != item:  # 2.5 is no 2
        raise ValueError(f"{item} is not {_KIND_NAMES[kind]}")
    return number


def flag_text(value: Any) -> str:
    """A field's value as it is written on the command line."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ",".join(map(str, value))
    return str(value)


def differing_fields(recorded: Mapping[str, Any], config: _Checked) -> list[str]:
    """Names of the fields whose value is not the recorded one, in order; `recorded` may spell tuples in any way."""
    return [field.name for field in dataclasses.fields(config) if not _is_recorded(field, recorded, config)]


def _is_recorded(field: dataclasses.Field, recorded: Mapping[str, Any], config: _Checked) -> bool:
    before, items = recorded.get(field.name), field.metadata["items"]
    if items and before is not None:
        try:
            before = as_items(before, items) if flag_text(before) else ()
        except (TypeError, ValueError):
            return False
    return before == getattr(config, field.name)


# The grid of Lawton et al. 2025 (arXiv 2510.01600), for either model.
PAPER_RATES = (1e-8, 3e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4)
SELECT = ("f1", "em", "recall_at_5", "dev_loss")
GRIDS = ("1d", "2d")


@dataclasses.dataclass(frozen=True)
class DecodeConfig(_Checked):
    """How answers are decoded."""

    decode: str = _field(
        "concat",
        "Answers from all passages in one prompt (concat), or from one prompt a passage, mixed token by token "
        "(rag_token) or answer by answer (rag_sequence); none: retrieval is measured alone, and no generator is "
        "loaded for it.",
        choices=DECODERS,
    )
    decode_variant: str = _field(
        "thorough",
        "rag_sequence: score every answer under every passage, or (fast) only under those whose search found it.",
        choices=DECODE_VARIANTS,
    )
    num_beams: int = _field(1, "Beams of the search for an answer; 1: greedy.", minimum=1)
    temperature: float = _field(
        0.0, "Above 0: draw answers, from sharper (below 1) or flatter distributions (concat only).", minimum=0
    )
    top_p: float = _field(1.0, "Draw from the likeliest tokens that hold this probability.", above=0, maximum=1)
    sample_seed: int = _field(0, "Seed of drawn answers.", minimum=0)
    max_new_tokens: int = _field(24, "Longest generated answer, in tokens.", minimum=1)


@dataclasses.dataclass(frozen=True)
class RunConfig(DecodeConfig):
    """Everything that decides a run's result."""

    decode: str = _field(
        "",
        "How answers are decoded before and after training, see ragjax.evaluate; left out: concat, and none for "
        "--strategy=embedder, which needs no generator then.",
        choices=("", *DECODERS),
    )
    strategy: str = _field("joint", "What is trained, in which order.", choices=tuple(map(str, Strategy)))
    objective: str = _field(
        "rag_token",
        "Loss: rag_token and rag_sequence mix single passages; concat_nll reads all passages in one prompt "
        "(generator only).",
        choices=OBJECTIVES,
    )
    retriever_objective: str = _field(
        "marginal",
        "Loss that moves the embedder where answers train it: the --objective itself (marginal), or one with the "
        "generator's likelihoods held constant; loop (two_phase only) has those of the answer without each passage.",
        choices=RETRIEVER_OBJECTIVES,
    )
    retriever_temperature: float = _field(
        1.0, "Flattens the likelihoods in emdr2, pdist, replug_lsr and loop.", above=0
    )
    embedder: str = _field("minilm", "Embedder: a short name, a hub id or a local folder.")
    generator: str = _field("smollm2-135m", "Generator: a short name, a hub id, a local folder or a .gguf file.")
    data: str = _field("sample", "Data: `sample` (shipped) or a folder with corpus, train, dev and test .jsonl(.gz).")
    run_dir: str = _field("", "Folder of this run; runs/STRATEGY where it is left out.")
    top_k: int = _field(5, "K, passages per question.", minimum=1)
    batch_size: int = _field(4, "Questions per optimizer step, over all devices and micro-batches.", minimum=1)
    gradient_accumulation: int = _field(1, "Micro-batches that a step's questions are split into.", minimum=1)
    epochs: int = _field(1, "Passes of each phase over the training questions, where --max_steps is 0.", minimum=1)
    max_steps: int = _field(0, "Optimizer steps of each phase; 0: as many as --epochs takes.", minimum=0)
    embedder_lr: float | None = _field(
        None, "Peak learning rate of the embedder; left out: the phase's own.", above=0, kind=float
    )
    generator_lr: float | None = _field(
        None, "Peak learning rate of the generator; left out: the phase's own.", above=0, kind=float
    )
    ranking_batch_size: int = _field(
        8, "Questions per step of multiple negatives ranking: each is a negative for the others.", minimum=1
    )
    ranking_scale: float = _field(20.0, "Multiplies the cosine in multiple negatives ranking.", above=0)
    hard_negatives: int = _field(
        5, "Passages that the untrained embedder ranks highest, positives left out, added per question.", minimum=0
    )
    negative_filter: str = _field(
        "labels",
        "What is no negative: other labelled passages of the question, or also (gist) those that the untrained "
        "embedder scores above the positive.",
        choices=NEGATIVE_FILTERS,
    )
    negative_margin: float = _field(
        0.0,
        "With --negative_filter=gist: a negative scores at least this share of the positive's score below it.",
        minimum=0,
        below=1,
    )
    embedder_run: str = _field("", "A finished run whose tuned embedder is taken over (strategy independent).")
    generator_run: str = _field(
        "", "A finished run whose tuned generator is taken over (strategies independent and two_phase)."
    )
    warmup_fraction: float = _field(
        0.05, "Share of the steps over which the rates rise, before they fall linearly.", minimum=0, maximum=1
    )
    weight_decay: float = _field(0.0, "AdamW's decoupled weight decay.", minimum=0)
    max_grad_norm: float = _field(1.0, "Each model's gradient is clipped to this norm.", above=0)
    loss_reduction: str = _field(
        "sum", "Sum of token losses per question, or mean over answer tokens.", choices=("sum", "mean")
    )
    score_scale: float = _field(20.0, "Multiplies the inner product before the softmax over passages.", above=0)
    lora_rank: int = _field(16, "Rank of the generator's adapters; 0: all weights are trained.", minimum=0)
    lora_alpha: float = _field(32.0, "Adapters are scaled by alpha / rank.", above=0)
    lora_dropout: float = _field(0.0, "Dropout on the adapters' input.", minimum=0, below=1)
    lora_targets: tuple[str, ...] = _field(
        LORA_TARGETS,
        "Projections with adapters, separated by commas.",
        items=LORA_TARGETS,
    )
    prompt: str = _field(
        "paper", "The plain prompt, or the same inside the model's chat template.", choices=("paper", "chat")
    )
    max_passage_tokens: int = _field(256, "Longer passages are cut there (generator's tokens).", minimum=1)
    seed: int = _field(0, "Seed of the question order, the adapters' start and dropout.", minimum=0)
    eval_split: str = _field("test", "Split of the before and after table.", choices=("test", "dev"))
    eval_limit: int = _field(0, "Evaluate the first N questions of the split; 0: all.", minimum=0)
    eval_batch_size: int = _field(8, "Questions decoded at once.", minimum=1)
    keep: str = _field(
        "best",
        "State that a phase ends with: the best by the dev questions, the start included, or the last.",
        choices=KEEP,
    )
    dev_every: int | None = _field(
        None,
        "Steps between measurements on the dev questions; left out: an eighth of the phase; 0: never.",
        minimum=0,
        kind=int,
    )
    dev_limit: int = _field(
        24, "Dev questions whose answers' loss is measured; retrieval is measured on up to 1,000.", minimum=1
    )
    checkpoint_every: int = _field(25, "Steps between checkpoints.", minimum=1)
    dtype: str = _field("float32", "Activations and frozen weights.", choices=("float32", "bfloat16"))
    quantize: str = _field(
        "none", "Store the generator's frozen layers in 8 or 4 bits (needs adapters).", choices=("none", *QUANTIZE)
    )
    scan_layers: bool = _field(True, "Loop over layers in one compiled body (off: unrolled).")
    remat: str = _field(
        "partial",
        "Recompute in the backward pass, instead of keeping it, all of a layer, all but its linear layers, or nothing.",
        choices=REMAT,
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.decode:
            object.__setattr__(self, "decode", "none" if self.strategy == "embedder" else "concat")

    @property
    def folder(self) -> str:
        """Where the run stands."""
        return self.run_dir or f"runs/{self.strategy}"


@dataclasses.dataclass(frozen=True)
class SearchConfig(_Checked):
    """What a learning-rate search tries, besides the flags of its runs."""

    embedder_rates: tuple[float, ...] = _field(
        PAPER_RATES, "Embedder rates to try, separated by commas.", items=float, above=0
    )
    generator_rates: tuple[float, ...] = _field(
        PAPER_RATES, "Generator rates to try, separated by commas.", items=float, above=0
    )
    select: str = _field(
        "",
        "Winner by the answers' f1 or em on the dev questions, or by their recall_at_5 or dev_loss, which need no "
        "decoding; left out: f1, recall_at_5 with --decode=none, and dev_loss where --halving is given.",
        choices=("", *SELECT),
    )
    halving: bool = _field(False, "After each third of the steps stop the half of the rates with the higher dev loss.")
    grid: str = _field(
        "1d", "Each model's rates by themselves, or (2d, strategy joint) every pair of them.", choices=GRIDS
    )

    def rates(self, model: str) -> list[float]:
        """The rates to try of "embedder" or "generator", lowest first."""
        return sorted(getattr(self, f"{model}_rates"))

    def selection(self, decode: str) -> str:
        """What decides between the rates of runs that decode like this."""
        if self.select:
            return self.select
        return "dev_loss" if self.halving else "recall_at_5" if decode == "none" else "f1"


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(_Checked):
    """What is evaluated on which questions, besides the overrides of the run's DecodeConfig."""

    run_dir: str = _field("", "Folder of a ragjax.train run; runs/joint where no model is given either.")
    embedder: str = _field("", "Without a run: an embedder as it is, by short name, hub id or folder.")
    generator: str = _field("", "Without a run: a generator as it is, by short name, hub id, folder or .gguf file.")
    data: str = _field("", "Data folder, or `sample`; left out: the run's, or else sample.")
    split: str = _field("test", "Questions to answer.", choices=("train", "dev", "test"))
    questions: str = _field("", "A file of questions instead of a split (.jsonl or .jsonl.gz, as in a data folder).")
    eval_limit: int = _field(0, "The first N questions; 0: all.", minimum=0)
    eval_batch_size: int = _field(8, "Questions decoded at once.", minimum=1)
    top_k: tuple[int, ...] = _field(
        (),
        "Passages to read; several numbers, separated by commas, are evaluated one after the other. Left out: the "
        "run's.",
        items=int,
        minimum=1,
    )
    decode: tuple[str, ...] = _field(
        (), f"Decoders, separated by commas: {', '.join(DECODERS)}; left out: the run's.", items=DECODERS
    )
    passage_answers: bool = _field(False, "Also write the greedy answer under each passage by itself.")
    paired_with: str = _field("", "A second run, evaluated on the same questions and compared with the first.")
    out: str = _field(
        "",
        "Folder for predictions and scores, the second run's in its folder paired/; left out: predictions/ in each "
        "run's own.",
    )
