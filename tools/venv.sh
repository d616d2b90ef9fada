#!/bin/sh
# Usage: venv.sh open DIR PYTHON    before installing into DIR: makes it, or makes it anew if an earlier installation was cut off
#        venv.sh close DIR          after installing: marks DIR as whole
# DIR/.ready says that DIR is whole (the Makefile's stamp), DIR/.unfinished that an installation is under way.
set -eu
step=$1
dir=$2

fail() {
    echo "$1" >&2
    exit 1
}

case $step in
open)
    python=$3
    if [ -e "$dir/.ready" ]; then
        mv "$dir/.ready" "$dir/.unfinished" # whole: brought up to date in place
        exit
    fi
    if [ -x "$dir/bin/python" ] && [ ! -e "$dir/.unfinished" ]; then
        exit # made by hand: installed into as it is
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "ragjax needs Python 3.11 or newer and '$python' is not: name one, as in make PYTHON=python3.11"
    if [ -d "$dir" ] && [ -n "$(ls -A "$dir")" ] && [ ! -e "$dir/pyvenv.cfg" ] && [ ! -e "$dir/.unfinished" ]; then
        fail "$dir is in the way: it is not a virtual environment; move it or name another folder"
    fi
    echo "making $dir with $("$python" --version)"
    rm -rf "$dir"
    mkdir -p "$dir"
    touch "$dir/.unfinished"
    "$python" -m venv "$dir"
    ;;
close)
    touch "$dir/.ready"
    rm -f "$dir/.unfinished"
    ;;
*)
    fail "venv.sh: unknown step '$step'"
    ;;
esac
