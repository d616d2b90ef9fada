"""The package: who imports whom, what is declared, what a wheel holds, how environments are made."""

import ast
import importlib.metadata
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.checkout import ROOT, in_checkout

PACKAGE = Path(importlib.util.find_spec("ragjax").submodule_search_locations[0])
SOURCES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

# What `python -m ragjax.NAME` runs: a file of this name, which runs the one in commands/.
COMMANDS = {"train", "evaluate", "prepare", "index", "ask", "export", "lr_search", "compare"}
FOUNDATIONS = {
    "arrays",
    "errors",
    "paths",
    "fields",
    "settings",
    "meshes",
    "voice",
    "files",
    "config",
    "parallel",
    "costs",
    "stopping",
    "version",
}
# The foundations that the other ones may stand on.
BEDROCK = {"errors", "paths", "fields", "settings", "meshes", "voice"}
# High to low, as in docs/ARCHITECTURE.md. A module imports from its own room and from those after it.
ROOMS = [
    COMMANDS,
    {"commands"},
    {"api"},
    {"comparison"},
    {"dry_run"},
    {"rates"},
    {"training"},
    {"exporting"},
    {"reporting"},
    {"evaluation"},
    {"runs"},
    {"pipeline"},
    {"indexing"},
    {"reranking"},
    {"pretrained"},
    {"embedding"},
    {"generation"},
    {"retrieval"},
    {"scoring"},
    {"weights"},
    {"data"},
    {"models"},
    {"losses", "metrics"},
    {"checkpoints"},
    FOUNDATIONS,
]
COMMAND_FILES = {f"commands/{name}.py" for name in [*COMMANDS, "flags"]}
INDEXES = ("Bm25Index", "DeviceIndex", "ExactIndex", "HybridIndex", "RerankedIndex", "TwoHopIndex")
# What one file alone (or the commands alone) may import, so that replacing it means editing one file.
HOMES = {
    "absl.app": COMMAND_FILES,
    "absl.flags": COMMAND_FILES,
    "bm25s": {"retrieval/bm25.py"},
    "datasets": {"data/sources/saved.py"},
    "fcntl": {"files/locks.py"},
    "faiss": {"retrieval/faiss_index.py"},
    "gguf": {"weights/gguf.py"},
    "jax.sharding": {"parallel/devices.py", "parallel/replicated.py", "parallel/sharded.py"},
    "jinja2": {"reporting/render.py"},
    "matplotlib": {"reporting/figures.py"},
    "tensorflow_datasets": {"data/sources/tfds.py"},
    "orbax": {"checkpoints.py"},
    "tqdm": {"voice.py"},
    # Which index there is, is chosen in one place; the others know a retriever.
    **{f"ragjax.retrieval.{name}": {"pipeline.py"} for name in INDEXES},
    "ragjax.retrieval.ExactIndex": {"pipeline.py", "indexing/recall.py"},
    "ragjax.retrieval.faiss_index": {
        "indexing/make.py",
        "indexing/needs.py",
        "retrieval/__init__.py",
        "retrieval/index_folder.py",
    },
    "ragjax.retrieval.device_index": {"retrieval/__init__.py"},
}
# Extras of what only some runs need: a run that does names the extra where it is missing.
OPTIONAL = ("bm25", "datasets", "tfds")
RUN_FOLDER = "runs/folder.py"
# What stands in a run folder; as a whole name anywhere, and the folders' names where they end a path.
RUN_FILES = {
    ".lock",
    "comparison.json",
    "config.json",
    "generations.jsonl",
    "likelihoods.jsonl",
    "metrics.jsonl",
    "report.html",
    "search.json",
    "search.png",
    "summary.json",
}
RUN_FOLDERS = {"checkpoints", "predictions", "tensorboard", "trials"}
# torch and what needs it stay in tests and benchmarks; unpickling runs whatever the file says.
BANNED = {"torch", "sentence_transformers", "tensorflow", "pickle", "dill", "cloudpickle", "joblib"}


def imports_in(source: str, file: str) -> list[str]:
    """Full dotted names of all that `source` imports, at any depth in it: `a.b.c` for `from a.b import c`.

    `file` is the module's path below the package, which relative imports start from.
    """
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                folders = ["ragjax", *Path(file).parts[:-1]]
                base = folders[: len(folders) - node.level + 1] + base
            names += [".".join([*base, alias.name]) for alias in node.names]
    return names


def room_of(module: str) -> int:
    """Position in ROOMS of the room that a name directly under `ragjax` belongs to."""
    for position, room in enumerate(ROOMS):
        if module in room:
            return position
    raise AssertionError(f"ragjax.{module} stands in no room: add it to ROOMS and docs/ARCHITECTURE.md")


def misdirected(source: str, file: str) -> list[str]:
    """The imports of `source` that point up, or from one foundation to another that is no bedrock."""
    own = Path(file).parts[0].removesuffix(".py")
    bad = []
    for name in imports_in(source, file):
        if name.split(".")[0] != "ragjax":
            continue
        target = name.split(".")[1] if "." in name else ""
        allowed = target != "" and room_of(target) >= room_of(own)
        if own in FOUNDATIONS:
            allowed = target in BEDROCK | {own}
        if not allowed:
            bad.append(name)
    return bad


def misplaced(source: str, file: str) -> list[str]:
    """The imports of `source` that ragjax has none of, or keeps in another file."""
    names = imports_in(source, file)
    bad = [name for name in names if name.split(".")[0] in BANNED]
    for name in names:
        for package, homes in HOMES.items():
            if f"{name}.".startswith(f"{package}.") and file not in homes:
                bad.append(name)
    return bad


@pytest.mark.parametrize(
    ("file", "source", "bad"),
    [
        ("losses.py", "import ragjax.models.bert", ["ragjax.models.bert"]),
        ("losses.py", "def f():\n    from ragjax import scoring", ["ragjax.scoring"]),
        ("losses.py", "from .weights import load", ["ragjax.weights.load"]),
        ("data/batches.py", "from ..retrieval.encode import x", ["ragjax.retrieval.encode.x"]),
        ("costs.py", "from ragjax import config", ["ragjax.config"]),
        ("scoring.py", "import ragjax", ["ragjax"]),
        ("costs.py", "from ragjax.errors import UserError", []),
        ("files/locks.py", "from ragjax.voice import say\nfrom ragjax.files.plain import write_atomic", []),
        ("voice.py", "from ragjax.files import write_json", ["ragjax.files.write_json"]),
        ("data/batches.py", "from .questions import Question\nimport numpy.ragjax", []),
        ("runs/folder.py", "from ragjax.evaluation import evaluate", ["ragjax.evaluation.evaluate"]),
        ("reporting/render.py", "from ragjax.training import train", ["ragjax.training.train"]),
        ("pipeline.py", "from ragjax.runs import Run", ["ragjax.runs.Run"]),
        ("api.py", "from ragjax.commands import flags", ["ragjax.commands.flags"]),
        ("commands/train.py", "from ragjax.training import loop\nimport ragjax.version", []),
    ],
)
def test_the_check_of_directions_tells_right_from_wrong(file, source, bad):
    assert misdirected(source, file) == bad


@pytest.mark.parametrize(
    ("file", "source", "bad"),
    [
        ("scoring.py", "import torch.nn as nn", ["torch.nn"]),
        ("training/loop.py", "from absl import flags, logging", ["absl.flags"]),
        ("retrieval/encode.py", "import faiss", ["faiss"]),
        ("training/state.py", "import orbax.checkpoint as ocp", ["orbax.checkpoint"]),
        ("checkpoints.py", "import orbax.checkpoint as ocp\nimport torchless", []),
        ("training/loop.py", "from ragjax.retrieval import ExactIndex, Index", ["ragjax.retrieval.ExactIndex"]),
        ("runs/run.py", "from ..retrieval import faiss_index", ["ragjax.retrieval.faiss_index"]),
        ("commands/ask.py", "from absl import app, flags", []),
        ("ask.py", "from absl import flags", ["absl.flags"]),
        ("training/loop.py", "from tqdm import tqdm", ["tqdm.tqdm"]),
        ("reporting/render.py", "from matplotlib import figure\nimport jinja2", ["matplotlib.figure"]),
        ("training/loop.py", "from jax.sharding import Mesh", ["jax.sharding.Mesh"]),
    ],
)
def test_the_check_of_homes_tells_right_from_wrong(file, source, bad):
    assert misplaced(source, file) == bad


def searched_indexes(source: str) -> int:
    """How often `source` calls the `search` of something that it names an index."""
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    searches = [call.value for call in calls if isinstance(call, ast.Attribute) and call.attr == "search"]
    return sum("index" in (getattr(value, "attr", None), getattr(value, "id", None)) for value in searches)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("rows, _ = self._pipeline.retriever.index.search(queries, k)", 1),
        ("index = f()\nindex.search(queries, k)", 1),
        ("self._index.search(vectors, k); retriever.retrieve(queries, k); index.describe(); re.search(a, b)", 0),
    ],
)
def test_the_check_of_searches_tells_right_from_wrong(source, count):
    assert searched_indexes(source) == count


def test_only_the_retriever_searches_an_index():
    """Everybody else would take what an index ranks by for p(z|x)."""
    found = {file: searched_indexes(path.read_text(encoding="utf-8")) for file, path in SOURCES.items()}
    assert {file for file, count in found.items() if count} == {"retrieval/retriever.py"}


def spelled_names(source: str) -> list[str]:
    """The names of a run folder's parts that `source` spells: in a path, alone or as the end of a text in it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [node.value] if node.value in RUN_FILES else []
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
            found += [node.right.value] if node.right.value in RUN_FOLDERS else []
    return found


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("path = run.folder / 'metrics.jsonl'", ["metrics.jsonl"]),
        ("FILE = 'summary.json'", ["summary.json"]),
        ("f(folder / 'predictions' / name)", ["predictions"]),
        ("result['predictions'] = 1; print('summary.json holds it.')", []),
    ],
)
def test_the_check_of_names_tells_right_from_wrong(source, names):
    assert spelled_names(source) == names


# What is done in one module only: what it is called, and where that stands.
SPEAKING = {"print", "sys.stdout.write", "sys.stderr.write"}
SPEAKER = "voice.py"
LAYING_OUT = {
    f"jax.{name}"
    for name in (
        "device_count",
        "devices",
        "lax.all_gather",
        "lax.axis_index",
        "lax.pmean",
        "lax.psum",
        "local_device_count",
        "local_devices",
        "make_mesh",
        "pmap",
        "process_count",
        "process_index",
        "shard_map",
    )
}
LAYOUT = "parallel/"


def used(source: str, names: set[str]) -> list[str]:
    """Those of the dotted names that `source` uses, or imports from their module."""
    found = [name for name in imports_in(source, "x.py") if name in names]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in names:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        ("print('a')", ["print"]),
        ("lines.map(print)", ["print"]),
        ("import sys\nsys.stderr.write('a')", ["sys.stderr.write"]),
        ("def f():\n    return jax.local_devices()[0]", ["jax.local_devices"]),
        ("from jax.lax import psum", ["jax.lax.psum"]),
        ("say('print')\nself.print(1)\nprint_answer()\nsys.stdout.isatty()\njax.device_get(x)", []),
    ],
)
def test_the_check_of_uses_tells_right_from_wrong(source, bad):
    assert used(source, SPEAKING | LAYING_OUT) == bad


@pytest.mark.parametrize("file", [file for file in SOURCES if file != SPEAKER])
def test_one_module_speaks(file):
    assert used(SOURCES[file].read_text(encoding="utf-8"), SPEAKING) == []


# `voice` asks for this process's number, before anything has to be laid out.
@pytest.mark.parametrize("file", [file for file in SOURCES if file != SPEAKER and not file.startswith(LAYOUT)])
def test_one_room_lays_out_devices(file):
    assert used(SOURCES[file].read_text(encoding="utf-8"), LAYING_OUT) == []


def test_those_modules_do():
    for file, names in ((SPEAKER, {"print"}), ("parallel/replicated.py", {"jax.pmap", "jax.lax.psum"})):
        assert names <= set(used(SOURCES[file].read_text(encoding="utf-8"), SPEAKING | LAYING_OUT))


# The rooms below read config.json of models, and nothing of a run.
@pytest.mark.parametrize(
    "file",
    [
        file
        for file in SOURCES
        if file not in ("__init__.py", RUN_FOLDER)
        and room_of(Path(file).parts[0].removesuffix(".py")) <= room_of("runs")
    ],
)
def test_one_file_spells_the_names_in_a_run_folder(file):
    assert spelled_names(SOURCES[file].read_text(encoding="utf-8")) == []


def test_the_run_folder_spells_them_all():
    assert set(spelled_names(SOURCES[RUN_FOLDER].read_text(encoding="utf-8"))) == RUN_FILES | RUN_FOLDERS


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_is_run_from_its_room(name):
    """The file above does nothing else as a program, so that it is free to be something else when it is imported."""
    assert f"commands/{name}.py" in SOURCES
    source = SOURCES[f"{name}.py"].read_text(encoding="utf-8")
    run = f'runpy.run_module("ragjax.commands.{name}", run_name="__main__", alter_sys=True)'
    assert f'if __name__ == "__main__":\n    {run}\n' in source
    assert len(source.splitlines()) < 20


@pytest.mark.parametrize("file", [file for file in SOURCES if file != "__init__.py"])
def test_imports_point_down(file):
    assert misdirected(SOURCES[file].read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize("file", SOURCES)
def test_heavy_packages_stay_in_their_file(file):
    assert misplaced(SOURCES[file].read_text(encoding="utf-8"), file) == []


def declared(extra: str = "") -> dict[str, Requirement]:
    """The installed package's requirements by canonical name: the plain ones, or those of one extra."""
    requirements = [Requirement(line) for line in importlib.metadata.requires("ragjax")]
    if extra:
        requirements = [r for r in requirements if r.marker and r.marker.evaluate({"extra": extra})]
    else:
        requirements = [r for r in requirements if r.marker is None]
    return {canonicalize_name(r.name): r for r in requirements}


def test_every_import_is_declared():
    imported = {
        name.split(".")[0]
        for file, path in SOURCES.items()
        for name in imports_in(path.read_text(encoding="utf-8"), file)
    }
    imported -= set(sys.stdlib_module_names) | {"ragjax"}
    carriers = importlib.metadata.packages_distributions()
    names = set(declared()).union(*map(declared, OPTIONAL))
    missing = [i for i in imported if not {canonicalize_name(d) for d in carriers.get(i, [])} & names]
    assert missing == []


def test_every_bound_has_two_ends_and_the_lowest_are_those_tried():
    pinned = {}
    for line in (Path(__file__).parent / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pinned[canonicalize_name(name)] = version
    lowest = {}
    for name, requirement in declared().items():
        ends = {spec.operator: spec.version for spec in requirement.specifier}
        assert set(ends) == {">=", "<"}, requirement
        lowest[name] = ends[">="]
    assert lowest == pinned


def test_accelerator_extras_take_the_same_jax():
    bounds = declared()["jax"].specifier
    for extra in ("cuda12", "cuda13", "tpu"):
        assert declared(extra)["jax"].specifier == bounds
        assert declared(extra)["jax"].extras == {extra}


def test_version_is_the_installed_one_and_costs_no_import():
    assert runpy.run_path(str(PACKAGE / "version.py"))["__version__"] == importlib.metadata.version("ragjax")
    assert imports_in((PACKAGE / "version.py").read_text(encoding="utf-8"), "version.py") == []


def test_package_data_is_beside_the_code():
    assert (PACKAGE / "py.typed").is_file()
    for name in ["corpus", "train", "dev", "test"]:
        assert (PACKAGE / "data" / "sample" / f"{name}.jsonl.gz").stat().st_size > 0
    sizes = [path.stat().st_size for path in (PACKAGE / "data" / "sample").iterdir() if path.is_file()]
    assert sum(sizes) <= 500_000


def test_every_folder_with_code_is_a_package():
    for file in SOURCES:
        assert (PACKAGE / file).with_name("__init__.py").is_file(), file


@in_checkout
def test_a_wheel_holds_the_whole_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "ragjax", source / "ragjax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ["setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"]:
        shutil.copy(ROOT / name, source)
    wanted = {path.relative_to(source).as_posix() for path in (source / "ragjax").rglob("*") if path.is_file()}
    # In a process of its own: the backend works in the current directory and patches the standard library.
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    version = runpy.run_path(str(ROOT / "ragjax" / "version.py"))["__version__"]
    assert wheel.name == f"ragjax-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith(f"ragjax-{version}.dist-info/")}
        assert f"ragjax-{version}.dist-info/licenses/LICENSE" in archive.namelist()
    assert names == wanted


STUB_PYTHON = """#!/bin/sh
case $1 in
-c) exit {old} ;;
--version) echo "Python 3" ;;
-m) mkdir -p "$3/bin"; touch "$3/pyvenv.cfg" "$3/bin/python"; chmod +x "$3/bin/python" ;;
esac
"""


class Environments:
    """Runs tools/venv.sh with a stand-in for Python that makes folders with the look of an environment."""

    def __init__(self, folder: Path):
        self.folder = folder / "env"
        self.python = folder / "python"
        self.use_python(old=0)

    def use_python(self, old: int):
        self.python.write_text(STUB_PYTHON.format(old=old), encoding="utf-8")
        self.python.chmod(0o755)

    def step(self, *arguments: str) -> subprocess.CompletedProcess:
        command = ["sh", str(ROOT / "tools" / "venv.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})

    def open(self) -> subprocess.CompletedProcess:
        return self.step("open", str(self.folder), str(self.python))

    def close(self) -> subprocess.CompletedProcess:
        return self.step("close", str(self.folder))


@pytest.fixture
def environments(tmp_path):
    return Environments(tmp_path)


@in_checkout
def test_an_environment_cut_off_half_way_is_made_anew(environments):
    assert environments.open().returncode == 0
    half_installed = environments.folder / "half_installed"
    half_installed.touch()
    assert environments.open().returncode == 0
    assert not half_installed.exists()
    assert (environments.folder / "bin" / "python").exists()
    assert not (environments.folder / ".ready").exists()


@in_checkout
def test_a_whole_environment_is_brought_up_to_date_in_place(environments):
    environments.open()
    environments.close()
    installed = environments.folder / "installed"
    installed.touch()
    assert environments.open().returncode == 0
    assert installed.exists()
    assert not (environments.folder / ".ready").exists()  # cut off now, it counts as half-made
    environments.open()
    assert not installed.exists()


@in_checkout
def test_an_environment_made_by_hand_is_kept(environments):
    subprocess.run([str(environments.python), "-m", "venv", str(environments.folder)], check=True)
    (environments.folder / "mine").touch()
    assert environments.open().returncode == 0
    assert (environments.folder / "mine").exists()


@in_checkout
def test_a_folder_that_is_no_environment_is_left_alone(environments):
    environments.folder.mkdir()
    (environments.folder / "letter").touch()
    done = environments.open()
    assert done.returncode != 0
    assert "is not a virtual environment" in done.stderr
    assert (environments.folder / "letter").exists()


@in_checkout
def test_an_old_python_is_refused_in_one_sentence(environments):
    environments.use_python(old=1)
    done = environments.open()
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not environments.folder.exists()
