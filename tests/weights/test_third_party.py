"""third_party/: the pins that pip installs from, the table that people read, and the code agree."""

import re

import pytest

from ragjax.weights.packages import PACKAGES, SLICED
from tests.checkout import ROOT, in_checkout

FOLDER = ROOT / "third_party"
pytestmark = in_checkout


def pins(file: str) -> dict[str, str]:
    """Version by name; every requirement must be pinned to one version and one hash."""
    text = (FOLDER / file).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "-r "))]
    found = [re.fullmatch(r"([a-z0-9-]+)==([0-9.]+) +--hash=sha256:[0-9a-f]{64}", line) for line in lines]
    assert all(found), lines
    return {match[1]: match[2] for match in found}


def test_the_demo_installs_what_the_code_reads():
    assert pins("weights-demo.txt") == {package.distribution: package.version for package in PACKAGES}


def test_all_weights_are_those_of_the_demo_and_the_slices_of_mpnet():
    assert "-r weights-demo.txt" in (FOLDER / "weights.txt").read_text(encoding="utf-8").splitlines()
    (mpnet,) = SLICED
    assert pins("weights.txt") == {package.distribution: package.version for package in mpnet.slices}
    assert [package.distribution[-5:] for package in mpnet.slices] == [f"t-00{number}" for number in range(1, 6)]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.short)
def test_the_table_says_what_the_code_checks(package):
    row = (
        f"| {package.short} | {package.distribution} {package.version} | `{package.weights}` | `{package.sha256}` "
        f"| {package.licence} |"
    )
    assert row in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()


def test_the_tables_say_what_the_code_joins():
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    (mpnet,) = SLICED
    files = {package.weights.replace(package.weights[-3:], "00N") for package in mpnet.slices}
    (file,) = files
    assert f"| mpnet | {mpnet.packages} | `{file}` | `{mpnet.folder}` | {mpnet.licence} |" in lines
    for number, package in enumerate(mpnet.slices, start=1):
        assert f"| slice {number} | `{package.sha256}` |" in lines
    assert f"| `{mpnet.folder}/model.safetensors` in it | `{mpnet.sha256}` |" in lines


def test_the_licences_that_the_table_links_are_there():
    links = re.findall(r"\((licenses/[^)]+)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert {FOLDER / link for link in links} == set((FOLDER / "licenses").iterdir())
    assert "Apache License" in (FOLDER / "licenses" / "Apache-2.0.txt").read_text(encoding="utf-8")
