#!/usr/bin/env bash
# Make an environment at one end of pyproject.toml's ranges, regardless of the lists of exact versions:
# make_range_venv.sh DIRECTORY highest|lowest-direct
#
# An existing one is updated to what the package index has now. lowest-direct: the lowest versions that
# the ranges allow, and the newest of what those packages need in turn.
set -euo pipefail
. tools/environments.sh

venv=$1 resolution=$2

# Only uv can resolve to the lowest versions.
INSTALLER=uv begin_environment "$venv"
touch "$venv/unfinished"
echo "installing pyproject.toml's ranges, $resolution: up to 3.2 GB to download, 6 GB on disk"
install "$venv" --upgrade --resolution "$resolution" --no-build-isolation --editable '.[dev]'
finish_environment "$venv"
