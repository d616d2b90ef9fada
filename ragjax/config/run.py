"""The configuration of a run: one frozen dataclass, whose fields are also flags.

Each field carries its help text and what it may hold, so a flag, its default, its bounds and the table in
docs/defaults.md have one source. No configuration exists with a value that cannot be meant: making one raises
UserError. Reasons and evidence for the defaults stand in that table.
"""

import dataclasses
import enum

from ragjax.errors import UserError
from ragjax.fields import Checked, field
from ragjax.meshes import read_mesh


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
PARALLELISM = ("pmap", "mesh")
ANSWERING = ("concat", "rag_token", "rag_sequence")
DECODERS = (*ANSWERING, "none")
DECODE_VARIANTS = ("thorough", "fast")
RETRIEVERS = ("dense", "bm25", "hybrid")
SEARCH_ON = ("host", "device")
DEVICE_DTYPES = ("float32", "bfloat16", "int8")


# The linear layers of a decoder, all of which can carry an adapter.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class DecodeConfig(Checked):
    """How answers are decoded."""

    decode: str = field(
        "concat",
        "Answer from all passages in one prompt (concat), or from one prompt per passage, mixed token by "
        "token (rag_token) or answer by answer (rag_sequence).",
        choices=ANSWERING,
    )
    decode_variant: str = field(
        "thorough",
        "rag_sequence: score every answer under every passage (thorough), or only under the passages for "
        "which it was found (fast).",
        choices=DECODE_VARIANTS,
    )
    num_beams: int = field(1, "Width of the beam search; 1: greedy decoding.", minimum=1)
    temperature: float = field(
        0.0,
        "Above 0: sample answers, from a sharper (below 1) or flatter (above 1) distribution. Needs --decode=concat.",
        minimum=0,
    )
    top_p: float = field(
        1.0, "Sample from the likeliest tokens that together have this probability.", above=0, maximum=1
    )
    sample_seed: int = field(0, "Seed of sampled answers.", minimum=0)
    max_new_tokens: int = field(24, "Longest generated answer, in tokens.", minimum=1)


@dataclasses.dataclass(frozen=True)
class RetrievalConfig(Checked):
    """How passages are found: what proposes them. Their order and p(z|x) always follow from the vectors."""

    retriever: str = field(
        "dense",
        "What finds passages: the embedder's vectors (dense), words (bm25), or both, their ranks fused (hybrid).",
        choices=RETRIEVERS,
    )
    hops: int = field(
        1,
        "Searches per question. 2: the question and its first passage make a second search, which finds half of the "
        "passages.",
        minimum=1,
        maximum=2,
    )
    rerank: str = field(
        "",
        "Choose the passages among the first --rerank_top by a cross-encoder (a hub id or a local folder), or by how "
        "likely the untrained generator finds the question after each (generator). Left out: no second look.",
        name=True,
    )
    rerank_top: int = field(20, "Passages that --rerank looks at.", minimum=1)
    index_dir: str = field(
        "",
        "Folder of an index that ragjax.index has built of these passages. Left out: all vectors are compared, from "
        "the cache.",
        path=True,
    )
    nprobe: int = field(
        0, "With --index_dir: lists of an IVF index that a question is looked up in; 0: as it was built.", minimum=0
    )
    search_on: str = field(
        "host", "Where vectors are searched: on the CPU (host), or on the accelerators (device).", choices=SEARCH_ON
    )
    device_dtype: str = field(
        "float32",
        "With --search_on=device: how the accelerators hold the vectors. Fewer bits take less memory.",
        choices=DEVICE_DTYPES,
    )
    device_recall: float = field(
        1.0,
        "With --search_on=device: below 1, a TPU's approximate top-k with this expected recall.",
        above=0,
        maximum=1,
    )

    @property
    def ranks_by_vectors(self) -> bool:
        """Whether what is proposed are the passages of the nearest vectors."""
        return self.retriever == "dense" and self.hops == 1 and not self.rerank

    @property
    def beyond_one_exact_search(self) -> str:
        """The flag, if there is one, by which something else is searched than all vectors, on the host, once."""
        asked = {
            f"--index_dir={self.index_dir}": bool(self.index_dir),
            f"--search_on={self.search_on}": self.search_on != "host",
            f"--hops={self.hops}": self.hops > 1,
            f"--rerank={self.rerank}": bool(self.rerank),
        }
        return next((flag for flag, given in asked.items() if given), "")


@dataclasses.dataclass(frozen=True)
class RunConfig(DecodeConfig, RetrievalConfig):
    """Everything that decides a run's result."""

    decode: str = field(
        "",
        "How to decode answers before and after training: as for ragjax.evaluate. none: measure retrieval alone, "
        "without loading a generator. Left out: concat, or none with --strategy=embedder.",
        choices=("", *DECODERS),
    )
    strategy: str = field("joint", "What to train, and in which order.", choices=tuple(map(str, Strategy)))
    objective: str = field(
        "rag_token",
        "Training loss: rag_token and rag_sequence read one passage per prompt and mix them; concat_nll "
        "reads all passages in one prompt and trains the generator only.",
        choices=OBJECTIVES,
    )
    retriever_objective: str = field(
        "marginal",
        "Loss for an embedder that is trained on answers: the --objective itself (marginal), or one that "
        "holds the generator's likelihoods constant; loop (two_phase only) has the answer's without each passage.",
        choices=RETRIEVER_OBJECTIVES,
    )
    retriever_temperature: float = field(
        1.0, "Temperature of the likelihoods in emdr2, pdist, replug_lsr and loop; higher is flatter.", above=0
    )
    embedder: str = field("minilm", "Embedder: a short name, a hub id or a local folder.", name=True)
    query_prefix: str | None = field(
        None, "Text put before each question for the embedder. Left out: the model's own.", kind=str
    )
    passage_prefix: str | None = field(
        None, "Text put before each passage for the embedder. Left out: the model's own.", kind=str
    )
    generator: str = field(
        "smollm2-135m", "Generator: a short name, a hub id, a local folder or a .gguf file.", name=True
    )
    data: str = field(
        "sample",
        "Data: `sample` (included), a folder that ragjax.prepare wrote, one in ragjax's own layout or another that it "
        "reads (docs/data.md), or a named set such as hotpotqa.",
        name=True,
    )
    run_dir: str = field("", "Folder of this run. Left out: runs/STRATEGY.", path=True)
    top_k: int = field(5, "Passages per question (K).", minimum=1)
    backward_passages: int = field(
        0,
        "Passages per question through which the generator learns, drawn from the answer's posterior so that the "
        "gradient is right on average. All K are still read. 0: all, the exact gradient.",
        minimum=0,
    )
    batch_size: int = field(4, "Questions per optimizer step, over all devices and micro-batches.", minimum=1)
    gradient_accumulation: int = field(1, "Micro-batches per optimizer step.", minimum=1)
    epochs: int = field(1, "Passes of each phase over the training questions, unless --max_steps is given.", minimum=1)
    max_steps: int = field(0, "Optimizer steps of each phase; 0: as many as --epochs takes.", minimum=0)
    embedder_lr: float | None = field(
        None, "Peak learning rate of the embedder. Left out: the phase's default.", above=0, kind=float
    )
    generator_lr: float | None = field(
        None, "Peak learning rate of the generator. Left out: the phase's default.", above=0, kind=float
    )
    ranking_batch_size: int = field(
        8,
        "Questions per step of multiple negatives ranking. The passages of each are negatives for the others.",
        minimum=1,
    )
    ranking_scale: float = field(20.0, "Factor on the cosine similarity in multiple negatives ranking.", above=0)
    hard_negatives: int = field(
        5,
        "Hard negatives per question: the passages that the untrained embedder ranks highest, except the positives.",
        minimum=0,
    )
    negative_filter: str = field(
        "gist",
        "Passages never used as negatives: the question's other labelled ones (labels), or also those that "
        "the untrained embedder scores above the positive (gist).",
        choices=NEGATIVE_FILTERS,
    )
    negative_margin: float = field(
        0.05,
        "With --negative_filter=gist: a negative must score lower than the positive by at least this share "
        "of the positive's score.",
        minimum=0,
        below=1,
    )
    refresh_passages: int = field(
        0,
        "Encode all passages anew with the embedder that is being trained, at least every N steps, and at the end; for "
        "small corpora. 0: the passages' vectors stay those of the untrained embedder.",
        minimum=0,
    )
    embedder_run: str = field("", "Finished run whose tuned embedder is reused (strategy independent).", path=True)
    generator_run: str = field(
        "", "Finished run whose tuned generator is reused (strategies independent and two_phase).", path=True
    )
    warmup_fraction: float = field(
        0.05,
        "Share of the steps over which the learning rates rise; after that they fall linearly.",
        minimum=0,
        maximum=1,
    )
    weight_decay: float = field(0.0, "AdamW's decoupled weight decay.", minimum=0)
    max_grad_norm: float = field(1.0, "Clip each model's gradient to this norm.", above=0)
    loss_reduction: str = field(
        "sum",
        "Sum the token losses of each question (sum), or average them over all answer tokens (mean).",
        choices=("sum", "mean"),
    )
    score_scale: float = field(20.0, "Factor on the inner product before the softmax over passages.", above=0)
    lora_rank: int = field(16, "Rank of the generator's adapters; 0: train all weights.", minimum=0)
    lora_alpha: float = field(32.0, "Adapters are scaled by alpha / rank.", above=0)
    lora_dropout: float = field(0.0, "Dropout on the adapters' input.", minimum=0, below=1)
    lora_targets: tuple[str, ...] = field(
        LORA_TARGETS,
        "Projections that get adapters, separated by commas.",
        items=LORA_TARGETS,
    )
    prompt: str = field(
        "paper",
        "The plain prompt (paper), or the same prompt inside the model's chat template (chat).",
        choices=("paper", "chat"),
    )
    max_passage_tokens: int = field(256, "Cut longer passages to this many of the generator's tokens.", minimum=1)
    seed: int = field(0, "Seed of the order of questions, the adapters' initial values and dropout.", minimum=0)
    eval_split: str = field("test", "Split that is evaluated before and after training.", choices=("test", "dev"))
    eval_limit: int = field(0, "Evaluate the first N questions of the split; 0: all.", minimum=0)
    eval_batch_size: int = field(8, "Questions decoded at once, on each device that has all weights.", minimum=1)
    keep: str = field(
        "best",
        "State that a phase ends with: the best on the dev questions, which may be the initial one, or the last.",
        choices=KEEP,
    )
    dev_every: int | None = field(
        None,
        "Steps between measurements on the dev questions; 0: never. Left out: an eighth of the phase.",
        minimum=0,
        kind=int,
    )
    dev_limit: int = field(24, "Dev questions for the dev loss. Retrieval is measured on up to 1,000.", minimum=1)
    checkpoint_every: int = field(25, "Steps between checkpoints.", minimum=1)
    keep_checkpoints: int = field(
        2,
        "Newest checkpoints of each phase to keep: where one is damaged, the one before it serves.",
        minimum=1,
    )
    max_nonfinite_steps: int = field(
        3,
        "A step whose loss or gradient is not finite is skipped; this many one after another end the training.",
        minimum=1,
    )
    dtype: str = field("float32", "Type of activations and frozen weights.", choices=("float32", "bfloat16"))
    quantize: str = field(
        "none", "Store the generator's frozen layers in 8 or 4 bits. Needs adapters.", choices=("none", *QUANTIZE)
    )
    scan_layers: bool = field(True, "Compile one layer and loop over all of them (off: compile every layer).")
    remat: str = field(
        "partial",
        "What to recompute in the backward pass instead of storing it: nothing (none), all but the linear "
        "layers (partial), or whole layers (full).",
        choices=REMAT,
    )
    parallelism: str = field(
        "pmap",
        "How several devices train: with all weights on each (pmap), or with the weights shared out over them (mesh).",
        choices=PARALLELISM,
    )
    mesh: str = field(
        "",
        "With --parallelism=mesh: devices along each axis, as in data:2,fsdp:4. data and fsdp share out questions, "
        "fsdp and tensor the weights. Left out: fsdp over all devices.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.mesh_sizes and self.parallelism != "mesh":
            raise UserError(f"--mesh={self.mesh} goes with --parallelism=mesh: give both, or leave it out.")
        if not self.decode:
            object.__setattr__(self, "decode", "none" if self.strategy == "embedder" else "concat")

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """Devices along each axis of --mesh; {} where it is left out."""
        return read_mesh(self.mesh)

    @property
    def folder(self) -> str:
        """Where the run stands."""
        return self.run_dir or f"runs/{self.strategy}"
