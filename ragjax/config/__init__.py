"""Configurations: frozen dataclasses, whose fields are also the commands' flags.

RunConfig (with DecodeConfig, RetrievalConfig), and what its fields may hold    run.py
SearchConfig, CompareConfig, EvaluateConfig, IndexConfig, PrepareConfig         commands.py
"""

from ragjax.config.commands import (
    CHUNKS,
    GRIDS,
    PAPER_RATES,
    ROWS,
    SELECT,
    CompareConfig,
    EvaluateConfig,
    IndexConfig,
    PrepareConfig,
    SearchConfig,
)
from ragjax.config.run import (
    ANSWERING,
    DECODE_VARIANTS,
    DECODERS,
    DEVICE_DTYPES,
    KEEP,
    LORA_TARGETS,
    NEGATIVE_FILTERS,
    OBJECTIVES,
    PARALLELISM,
    QUANTIZE,
    REMAT,
    RETRIEVER_OBJECTIVES,
    RETRIEVERS,
    SEARCH_ON,
    DecodeConfig,
    RetrievalConfig,
    RunConfig,
    Strategy,
)

__all__ = [
    "ANSWERING",
    "CHUNKS",
    "CompareConfig",
    "DECODERS",
    "DECODE_VARIANTS",
    "DEVICE_DTYPES",
    "DecodeConfig",
    "EvaluateConfig",
    "GRIDS",
    "IndexConfig",
    "KEEP",
    "LORA_TARGETS",
    "NEGATIVE_FILTERS",
    "OBJECTIVES",
    "PAPER_RATES",
    "PARALLELISM",
    "PrepareConfig",
    "QUANTIZE",
    "REMAT",
    "RETRIEVERS",
    "RETRIEVER_OBJECTIVES",
    "ROWS",
    "RetrievalConfig",
    "RunConfig",
    "SEARCH_ON",
    "SELECT",
    "SearchConfig",
    "Strategy",
]
