"""The configuration of a run: one frozen dataclass, whose fields are also the commands' flags.

Each field carries its help text and what it may hold, so a flag, its default, its bounds and the table in
docs/defaults.md have one source. No configuration exists with a value that cannot be meant: making one raises
UserError. Reasons and evidence for the defaults stand in that table.
"""

import dataclasses
import math
from typing import Any

from ragjax.errors import UserError

STRATEGIES = ("none", "generator", "joint", "embedder", "independent", "two_phase", "auto")
OBJECTIVES = ("rag_token", "rag_sequence", "concat_nll")
RETRIEVER_OBJECTIVES = ("marginal", "emdr2", "pdist", "replug_lsr")
NEGATIVE_FILTERS = ("labels", "gist")
QUANTIZE = ("int8", "nf4")
REMAT = ("none", "partial", "full")
DECODERS = ("concat", "rag_token", "rag_sequence")
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
    items: of a list in a string, separated by commas: what to choose from, or the kind of its (positive) numbers.
    minimum, above, maximum, below: of a number, or of a list's numbers.
    """
    metadata = {"help": help, "choices": choices, "kind": kind or type(default), "items": items}
    metadata["range"] = _Range(minimum, above, maximum, below)
    return dataclasses.field(default=default, metadata=metadata)


class _Checked:
    """A configuration whose values are checked, and whose lists are tidied, when it is made."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, rules = getattr(self, field.name), field.metadata
            if rules["items"] and (value or field.default):
                # "a, b" and "a,b" are one configuration, also where a run's flags are compared with another's.
                object.__setattr__(self, field.name, ",".join(_items(field.name, value, rules)))
            elif rules["choices"] and value not in rules["choices"]:
                known = ", ".join(filter(None, rules["choices"]))
                raise UserError(f"--{field.name}={value} is not known: choose from {known}.")
            elif rules["kind"] in (int, float) and value is not None and value not in rules["range"]:
                raise UserError(f"--{field.name}={value:g} is out of range: give a number {rules['range']}.")


def _items(name: str, text: str, rules: Any) -> list[str]:
    """The parts of a list without blanks around them, each once. Raises UserError for one that may not be there."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if not isinstance(rules["items"], tuple):
        if not all(_is_number(part, rules["items"], rules["range"]) for part in parts):
            example = "1,5,10" if rules["items"] is int else "1e-6,3e-6,1e-5"
            raise UserError(f"--{name}={text} is no list of positive numbers: write it as {example}.")
    elif unknown := [part for part in parts if part not in rules["items"]]:
        raise UserError(f"--{name}={unknown[0]} is not known: choose from {', '.join(rules['items'])}.")
    return parts


def _is_number(text: str, kind: type, within: _Range) -> bool:
    try:
        return kind(text) in within
    except ValueError:
        return False


# The grid of Lawton et al. 2025 (arXiv 2510.01600), for either model.
PAPER_RATES = "1e-8,3e-8,1e-7,3e-7,1e-6,3e-6,1e-5,3e-5,1e-4"
SELECT = ("f1", "em", "dev_loss")
GRIDS = ("1d", "2d")


@dataclasses.dataclass(frozen=True)
class DecodeConfig(_Checked):
    """How answers are decoded."""

    decode: str = _field(
        "concat",
        "Answers from all passages in one prompt (concat), or from one prompt a passage, mixed token by token "
        "(rag_token) or answer by answer (rag_sequence).",
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

    strategy: str = _field("joint", "What is trained, in which order.", choices=STRATEGIES)
    objective: str = _field(
        "rag_token",
        "Loss: rag_token and rag_sequence mix single passages; concat_nll reads all passages in one prompt "
        "(generator only).",
        choices=OBJECTIVES,
    )
    retriever_objective: str = _field(
        "marginal",
        "Loss that moves the embedder where answers train it: the --objective itself (marginal), or one with the "
        "generator's likelihoods held constant.",
        choices=RETRIEVER_OBJECTIVES,
    )
    retriever_temperature: float = _field(1.0, "Flattens the likelihoods in emdr2, pdist and replug_lsr.", above=0)
    embedder: str = _field("minilm", "Embedder: a short name, a hub id or a local folder.")
    query_prefix: str | None = _field(
        None, "Text put in front of a question for the embedder; left out: the model's own.", kind=str
    )
    passage_prefix: str | None = _field(
        None, "Text put in front of a passage for the embedder; left out: the model's own.", kind=str
    )
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
    lora_targets: str = _field(
        ",".join(LORA_TARGETS),
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
    dev_every: int = _field(50, "Steps between measurements of the dev loss; 0: never.", minimum=0)
    dev_limit: int = _field(24, "Dev questions in that measurement.", minimum=1)
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

    @property
    def lora_target_names(self) -> tuple[str, ...]:
        return tuple(self.lora_targets.split(","))


@dataclasses.dataclass(frozen=True)
class SearchConfig(_Checked):
    """What a learning-rate search tries, besides the flags of its runs."""

    embedder_rates: str = _field(PAPER_RATES, "Embedder rates to try, separated by commas.", items=float, above=0)
    generator_rates: str = _field(PAPER_RATES, "Generator rates to try, separated by commas.", items=float, above=0)
    select: str = _field(
        "",
        "Winner by the answers' f1 or em on the dev questions, or by their dev_loss, which needs no decoding; left "
        "out: f1, and dev_loss where --halving is given.",
        choices=("", *SELECT),
    )
    halving: bool = _field(False, "After each third of the steps stop the half of the rates with the higher dev loss.")
    grid: str = _field(
        "1d", "Each model's rates by themselves, or (2d, strategy joint) every pair of them.", choices=GRIDS
    )

    def rates(self, model: str) -> list[float]:
        """The rates to try of "embedder" or "generator", each once, in order."""
        return sorted({float(rate) for rate in getattr(self, f"{model}_rates").split(",")})

    @property
    def selection(self) -> str:
        """What decides between the rates."""
        return self.select or ("dev_loss" if self.halving else "f1")


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
    top_k: str = _field(
        "",
        "Passages to read; several numbers, separated by commas, are evaluated one after the other.",
        items=int,
        minimum=1,
    )
    decode: str = _field(
        "", f"Decoders, separated by commas: {', '.join(DECODERS)}; left out: the run's.", items=DECODERS
    )
    passage_answers: bool = _field(False, "Also write the greedy answer under each passage by itself.")
    paired_with: str = _field("", "A second run, evaluated on the same questions and compared with the first.")
    out: str = _field(
        "",
        "Folder for predictions and scores, the second run's in its folder paired/; left out: predictions/ in each "
        "run's own.",
    )

    @property
    def numbers_of_passages(self) -> list[int]:
        """Those asked for; none: the run's."""
        return [int(number) for number in self.top_k.split(",")] if self.top_k else []

    @property
    def decoders(self) -> list[str]:
        """Those asked for; none: the run's."""
        return self.decode.split(",") if self.decode else []
