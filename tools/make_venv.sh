#!/usr/bin/env bash
# Makes the virtual environment that the Makefile's targets run in: make_venv.sh DIRECTORY
#
# An existing one is kept and brought to the versions of tools/requirements/dev.txt.
set -euo pipefail
. tools/environments.sh

venv=$1

begin_environment "$venv"
# As constraints, so that only what something asks for is installed: a PyTorch without CUDA asks for
# none of its libraries.
packages=(--constraint "$requirements/dev.txt" --no-build-isolation --editable '.[dev]')
# Without a network an environment that works is left alone.
[ ! -e "$venv/ready" ] ||
    (unset UV_TORCH_BACKEND && install "$venv" --dry-run --quiet "${packages[@]}")
touch "$venv/unfinished"
rm -f "$venv/ready"
echo "installing $requirements/dev.txt with $installer: on Linux 3.2 GB to download (2.2 GB of" \
    "them CUDA's: docs/install.md has the way without) and 6 GB on disk; minutes, later seconds"
# First and alone: uv looks for Triton, too, only where PyTorch's other builds are.
if [ "$installer" = uv ] && [ -n "${UV_TORCH_BACKEND:-}" ]; then
    install "$venv" --constraint "$requirements/dev.txt" torch
    unset UV_TORCH_BACKEND
fi
install "$venv" "${packages[@]}"
finish_environment "$venv"
