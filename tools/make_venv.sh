#!/usr/bin/env bash
# Make the virtual environment that the Makefile's targets run in: make_venv.sh DIRECTORY
#
# An existing one is kept and updated to the versions of tools/requirements/dev.txt.
set -euo pipefail
. tools/environments.sh

venv=$1

begin_environment "$venv"
# The list is a constraint, so that only what a package requires is installed: a PyTorch without CUDA
# requires none of CUDA's libraries.
packages=(--constraint "$requirements/dev.txt" --no-build-isolation --editable '.[dev]')
# Fails here if there is no network, so that an environment that works is left alone.
[ ! -e "$venv/ready" ] ||
    (unset UV_TORCH_BACKEND && install "$venv" --dry-run --quiet "${packages[@]}")
touch "$venv/unfinished"
rm -f "$venv/ready"
echo "installing $requirements/dev.txt with $installer: on Linux 3.2 GB to download (2.2 GB of it" \
    "CUDA; docs/install.md says how to do without) and 6 GB on disk; minutes, later seconds"
# torch alone first: in one call, uv would look for Triton, too, only where PyTorch's builds are.
if [ "$installer" = uv ] && [ -n "${UV_TORCH_BACKEND:-}" ]; then
    install "$venv" --constraint "$requirements/dev.txt" torch
    unset UV_TORCH_BACKEND
fi
install "$venv" "${packages[@]}"
finish_environment "$venv"
