"""What all tests share."""

import os
from pathlib import Path

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Where arrays are annotated with their shapes, the tests hold every call to them. A whole number is a float here, as it
# is to a static checker. Tuples that stand for a batch (NamedTuple) are not checked when they are made: the same ones
# hold shapes, gradients and stacked batches. Nothing of ragjax may be imported before this.
install_import_hook(
    [
        f"ragjax.{name}"
        for name in (
            "data.batches",
            "generation",
            "losses",
            "models",
            "retrieval",
            "scoring",
            "training.objectives",
            "training.state",
            "training.step",
        )
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

# The same examples in every run, no database folder in the tree, and a busy machine is no failure.
settings.register_profile("ragjax", derandomize=True, database=None, deadline=None)
settings.load_profile("ragjax")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: begun last, one would keep a core busy while the others have nothing to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """Compiled programs go with their test file: a process may have only so many memory maps (65,530 on Linux)."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that holds hotpotqa, popqa and squad: $RAGJAX_DATA, or shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("RAGJAX_DATA") or beside)
    if not (folder / "hotpotqa").is_dir():
        pytest.skip("needs the real data: set RAGJAX_DATA to the folder that holds hotpotqa, popqa and squad")
    return folder
