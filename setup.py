"""Packaging of ragjax: dependencies with the bounds that were tried, extras, package data."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(HERE / "ragjax" / "version.py"))["__version__"]

# name, oldest version tried, first series not tried. The newest were tried together on Python 3.11 (`make test`) and
# 3.13 (`make test-newest`), the oldest together on 3.11 (tests/constraints-lowest.txt, `make test-lowest`). jax from
# 0.11 on and numpy from 2.5 on want Python 3.12, so pip takes 0.10 and 2.4 on 3.11. faiss-cpu before 1.14 crashes the
# interpreter at import when warnings are errors.
TRIED = [
    ("absl-py", "2.3.0", "2.6"),
    ("faiss-cpu", "1.14.2", "1.16"),
    ("flax", "0.12.4", "0.13"),
    ("gguf", "0.17.0", "0.20"),
    ("huggingface_hub", "1.16.0", "2.5"),
    ("jinja2", "3.1.6", "3.2"),  # reports, and chat templates (--prompt=chat)
    ("jax", "0.9.0", "0.13"),
    ("jaxtyping", "0.3.3", "0.4"),
    ("matplotlib", "3.10.0", "3.12"),
    ("ml_dtypes", "0.5.3", "0.7"),
    ("numpy", "2.2.0", "2.6"),
    ("optax", "0.2.6", "0.3"),
    ("orbax-checkpoint", "0.11.33", "0.13"),
    ("pyarrow", "21.0.0", "27"),
    ("safetensors", "0.7.0", "0.9"),
    ("semantic-text-splitter", "0.28.0", "0.34"),
    ("tensorboardX", "2.6.4", "2.7"),
    ("tokenizers", "0.22.2", "0.24"),
    ("tqdm", "4.67.0", "4.71"),
    ("transformers", "5.10.2", "5.24"),
]
DATASETS = ["datasets>=4.4.2,<6"]
# TFDS itself does not ask for importlib_resources, which it needs for builders in a package.
TFDS = ["importlib_resources>=6.4,<8", "tensorflow-datasets>=4.9.10,<4.10"]
JAX_BOUNDS = next(f">={lowest},<{untried}" for name, lowest, untried in TRIED if name == "jax")

setup(
    name="ragjax",
    version=VERSION,
    description="Fine-tunes the retriever and the generator of a RAG pipeline, apart or jointly, in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["ragjax", "ragjax.*"]),
    package_data={
        "ragjax": ["py.typed"],
        "ragjax.data": ["sample/*.jsonl.gz", "sample/*.md"],
        "ragjax.reporting": ["templates/*"],
        "ragjax.weights": ["shapes/*/config.json"],
    },
    install_requires=[f"{name}>={lowest},<{untried}" for name, lowest, untried in TRIED],
    extras_require={
        "cuda12": [f"jax[cuda12]{JAX_BOUNDS}"],
        "cuda13": [f"jax[cuda13]{JAX_BOUNDS}"],
        "tpu": [f"jax[tpu]{JAX_BOUNDS}"],
        # Search by words (--retriever=bm25|hybrid).
        "bm25": ["bm25s>=0.3.16,<0.4"],
        # Data sets by name, and what these two libraries keep. Both are imported when they are needed.
        "datasets": DATASETS,
        "tfds": TFDS,
        # The references that parity tests compare with. Install torch by itself first: see BUILD.md. transformers
        # needs accelerate to read GGUF files.
        "parity": [
            "accelerate>=1.15,<1.16",
            "peft>=0.21.2,<0.22",
            "sentence-transformers>=6.2,<6.3",
            "torch==2.13.0",
        ],
        # The site (`make docs`): one version of each, because the build is strict.
        "docs": [
            "latex2mathml==3.81.1",
            "mkdocs==1.6.1",
            "mkdocs-material==9.8.2",
            "mkdocstrings[python]==1.0.8",
            "mkdocstrings-python==2.0.11",
            "ruff>=0.17.6,<0.18",  # breaks long signatures
        ],
        # setuptools: the packaging test builds a wheel without reaching for the network.
        # beartype: the tests check the shapes in jaxtyping's annotations with it.
        "dev": [
            "beartype>=0.22.9,<0.24",
            "bm25s>=0.3.16,<0.4",
            *DATASETS,
            "hypothesis>=6.170,<7",
            "pre-commit>=4.6,<5",
            "pytest>=9.2,<10",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.17.6,<0.18",
            "setuptools>=80,<85",
            *TFDS,
            "ty==0.0.107",
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
