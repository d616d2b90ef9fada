"""What the other commands take, besides the flags of the runs that they make or read."""

import dataclasses

from ragjax.config.run import DECODERS
from ragjax.errors import UserError
from ragjax.fields import Checked, field

# The rows of a comparison, as in the paper's tables: comparison/matrix.py says what each trains.
ROWS = ("none", "embedder", "generator", "independent", "two_phase", "rag_sequence", "rag_token")
# The grid of Lawton et al. 2025 (arXiv 2510.01600), for either model.
PAPER_RATES = (1e-8, 3e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4)
SELECT = ("f1", "em", "recall_at_5", "dev_loss")
GRIDS = ("1d", "2d")
CHUNKS = ("none", "paragraphs", "words", "tokens")


@dataclasses.dataclass(frozen=True)
class SearchConfig(Checked):
    """What a learning-rate search tries, besides the flags of its runs."""

    embedder_rates: tuple[float, ...] = field(
        PAPER_RATES, "Embedder rates to try, separated by commas.", items=float, above=0
    )
    generator_rates: tuple[float, ...] = field(
        PAPER_RATES, "Generator rates to try, separated by commas.", items=float, above=0
    )
    select: str = field(
        "",
        "Choose the winner on the dev questions by the answers' f1 or em, or by recall_at_5 or dev_loss, "
        "which need no decoding. Left out: f1; recall_at_5 with --decode=none; dev_loss with --halving.",
        choices=("", *SELECT),
    )
    halving: bool = field(False, "After each third of the steps, stop the half of the rates with the higher dev loss.")
    grid: str = field(
        "1d",
        "Search each model's rates separately (1d), or every pair of them (2d, strategy joint only).",
        choices=GRIDS,
    )

    def rates(self, model: str) -> list[float]:
        """The rates to try of "embedder" or "generator", lowest first."""
        return sorted(getattr(self, f"{model}_rates"))

    def selection(self, decode: str) -> str:
        """What decides between the rates of runs that decode like this."""
        if self.select:
            return self.select
        return "recall_at_5" if decode == "none" else "dev_loss" if self.halving else "f1"


@dataclasses.dataclass(frozen=True)
class CompareConfig(Checked):
    """What a comparison runs, besides the flags that all its runs share."""

    strategies: tuple[str, ...] = field(
        ROWS,
        "Rows of the table, separated by commas: rag_sequence and rag_token train both models jointly.",
        items=ROWS,
    )
    seeds: tuple[int, ...] = field((0,), "Seeds, separated by commas: each row is run with each.", items=int, minimum=0)
    embedders: tuple[str, ...] = field(
        ("minilm",), "Embedders, separated by commas: short names, hub ids or folders.", items=str, name=True
    )
    generators: tuple[str, ...] = field(
        ("smollm2-135m",),
        "Generators, separated by commas: short names, hub ids, folders or .gguf files. Each goes with each embedder.",
        items=str,
        name=True,
    )
    search: bool = field(
        False,
        "Choose the embedder's learning rates on the dev questions first: one for labels by Recall@5, one for answers "
        "by the dev loss.",
    )
    embedder_rates: tuple[float, ...] = field(
        PAPER_RATES, "With --search: embedder rates to try, separated by commas.", items=float, above=0
    )
    texts: bool = field(
        True, "Quote questions, passages and answers in the report; off: ids and figures alone, for data under licence."
    )
    dry_run: bool = field(False, "Print what would be run, and what that takes, and stop.")


@dataclasses.dataclass(frozen=True)
class DryRunConfig(Checked):
    """Whether a training is only tried out, and on what."""

    dry_run: bool = field(
        False,
        "Compile each phase's step from config.json alone, print what it takes of each device, and stop; refuse what "
        "cannot fit.",
    )
    devices: str = field(
        "", "With --dry_run: a machine by name, such as 8xa10, 8xh100 or v5e-64. Left out: the devices here."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.devices and not self.dry_run:
            raise UserError(f"--devices={self.devices} goes with --dry_run: a run takes the devices that are here.")


@dataclasses.dataclass(frozen=True)
class ProcessConfig(Checked):
    """Which of several processes this is, on one host or on many."""

    coordinator_address: str = field(
        "",
        "HOST:PORT of the first of several processes, any free port of its host, or auto where the cluster says it "
        "(Slurm, GKE, TPU VMs). Each process gets the same flags but for --process_id. Left out: one process.",
    )
    num_processes: int | None = field(None, "With --coordinator_address: how many processes.", kind=int, minimum=1)
    process_id: int | None = field(
        None,
        "With --coordinator_address: which of them this is, from 0, the one that prints.",
        kind=int,
        minimum=0,
    )

    def __post_init__(self):
        super().__post_init__()
        host, _, port = self.coordinator_address.rpartition(":")
        count, number = self.num_processes, self.process_id
        if self.coordinator_address in ("", "auto"):
            if count is not None or number is not None:
                raise UserError(
                    "--num_processes and --process_id go with --coordinator_address=HOST:PORT, the first process's."
                )
        elif not host or not port.isdecimal():
            raise UserError(
                f"--coordinator_address={self.coordinator_address} is no HOST:PORT such as host:8476: give one or auto."
            )
        elif count is None or number is None:
            raise UserError("--coordinator_address=HOST:PORT needs --num_processes and --process_id, too.")
        elif number >= count:
            raise UserError(f"--process_id={number} is not one of {count} processes: give 0 to {count - 1}.")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Checked):
    """What is evaluated on which questions, besides the overrides of the run's DecodeConfig."""

    run_dir: str = field("", "Folder of a ragjax.train run. Left out: runs/joint, unless models are given.", path=True)
    embedder: str = field("", "Instead of a run's: an untrained embedder, by short name, hub id or folder.", name=True)
    generator: str = field(
        "", "Instead of a run's: an untrained generator, by short name, hub id, folder or .gguf file.", name=True
    )
    data: str = field(
        "",
        "Data, as for ragjax.train; for a run: where its data are now. Left out: where the run found them, or "
        "sample where there is no run.",
        name=True,
    )
    split: str = field("test", "Questions to answer.", choices=("train", "dev", "test"))
    questions: str = field(
        "", "File of questions to answer instead of a split (.jsonl or .jsonl.gz, as in a data folder).", path=True
    )
    eval_limit: int = field(0, "Answer the first N questions; 0: all.", minimum=0)
    eval_batch_size: int = field(8, "Questions decoded at once, on each device that has all weights.", minimum=1)
    top_k: tuple[int, ...] = field(
        (),
        "Passages per question. Several numbers, separated by commas, are evaluated one after another. "
        "Left out: the run's.",
        items=int,
        minimum=1,
    )
    decode: tuple[str, ...] = field(
        (),
        f"Decoders, separated by commas: {', '.join(DECODERS)} (retrieval alone, no generator). Left out: the run's.",
        items=DECODERS,
    )
    passage_answers: bool = field(False, "Also write the greedy answer under each single passage.")
    paired_with: str = field("", "Second run to evaluate on the same questions and compare with the first.", path=True)
    out: str = field(
        "",
        "Folder for predictions and scores; those of a second run go into its folder paired/. Left out: "
        "the folder predictions/ of each run.",
        path=True,
    )


@dataclasses.dataclass(frozen=True)
class IndexConfig(Checked):
    """What an index is made of, and how."""

    data: str = field("sample", "Data: its passages are indexed, its dev questions measure the index.", name=True)
    index_dir: str = field("", "Folder of the index. It is needed.", path=True)
    embedder: str = field("minilm", "Embedder: a short name, a hub id or a local folder.", name=True)
    query_prefix: str | None = field(
        None, "Text put before each question for the embedder. Left out: the model's own.", kind=str
    )
    passage_prefix: str | None = field(
        None, "Text put before each passage for the embedder. Left out: the model's own.", kind=str
    )
    dtype: str = field("float32", "Type of activations while encoding.", choices=("float32", "bfloat16"))
    vector_dtype: str = field(
        "float32", "Type of the stored vectors; bfloat16 takes half the disk.", choices=("float32", "bfloat16")
    )
    index: str = field(
        "Flat",
        "FAISS factory string: Flat compares all vectors; IVF4096,Flat, IVF65536,PQ64, HNSW32 and others look at a "
        "part, or at codes.",
    )
    nprobe: int = field(0, "Lists of an IVF index that a question is looked up in; 0: 32.", minimum=0)
    train_sample: int = field(0, "Vectors to train the index on; 0: 64 for each list, at least 65,536.", minimum=0)
    verify: bool = field(False, "Hash every file of the folder, also those whose size and time are as they were.")
    dry_run: bool = field(False, "Print what the index takes, and stop.")


@dataclasses.dataclass(frozen=True)
class PrepareConfig(Checked):
    """What is brought into a data folder."""

    source: str = field(
        "",
        "Questions, and passages unless --corpus is given: a folder in any layout that ragjax reads (docs/data.md), or "
        "a named set: hotpotqa, popqa, squad, nq_open, triviaqa, wikipedia, tfds:NAME.",
        name=True,
    )
    corpus: str = field(
        "", "Where the passages come from instead: a folder, a file or a named set. Left out: --source.", name=True
    )
    out: str = field("", "Folder to write. It must not exist yet.", path=True)
    chunk: str = field(
        "none",
        "How documents are cut into passages: not at all (none), into paragraphs, sentences where they are longer "
        "(paragraphs), into runs of words, or like paragraphs but measured in tokens of --embedder.",
        choices=CHUNKS,
    )
    chunk_size: int | None = field(
        None,
        "Longest passage, in characters (paragraphs), words or tokens. Left out: 1000, 100 or 256.",
        minimum=1,
        kind=int,
    )
    chunk_overlap: int | None = field(
        None,
        "How much of a passage may stand in the next one too, in the same unit. Left out: 200, 0 or 0.",
        minimum=0,
        kind=int,
    )
    embedder: str = field("minilm", "With --chunk=tokens: whose tokens count.", name=True)
