#!/bin/sh
# Usage: find_python.sh VERSION    prints a command that runs this Python (3.13), from PATH or among pyenv's versions;
# where there is none, the name that one would look for, and ends with 1.
set -eu
name=python$1
for candidate in "$name" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1"*/bin/"$name"; do
    if "$candidate" -c '' 2>/dev/null; then
        echo "$candidate"
        exit
    fi
done
echo "$name"
exit 1
