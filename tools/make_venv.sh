#!/usr/bin/env bash
# Makes the virtual environment that the Makefile's targets run in: make_venv.sh DIRECTORY
#
# An existing one is kept and brought up to date. The interpreter is the first of $PYTHON,
# python3.12, python3.13, python3.14, python3 and pyenv's versions that runs and is 3.12 or newer
# (megatron-core needs that; it ships wheels for 3.12 and 3.13).
set -euo pipefail

venv=$1

is_usable() {
    # By running it: a pyenv shim that is not activated exists on PATH and fails when called.
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.13 python3.14 python3; do
        if [ -n "$candidate" ] && is_usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    local versions
    versions=$(pyenv root 2>/dev/null)/versions || versions=$HOME/.pyenv/versions
    for candidate in "$versions"/3.1[2-9]*/bin/python; do
        if is_usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

if ! is_usable "$venv/bin/python"; then
    python=$(find_python) || {
        echo "No Python 3.12 or newer with venv was found: install one (Debian, Ubuntu:" \
            "apt-get install python3.12 python3.12-venv), or name it in PYTHON=." >&2
        exit 1
    }
    echo "making $venv with $("$python" --version) ($python)"
    "$python" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
