#!/usr/bin/env bash
# Another release of megatron-core, to put on PYTHONPATH: lay_megatron_over.sh VENV VERSION
#
# VENV/megatron-core-VERSION will hold that wheel alone, and a stamp once it is complete. On
# PYTHONPATH it comes before the installed release and shares its torch.
set -euo pipefail

venv=$1 version=$2
target=$venv/megatron-core-$version

rm -rf "$target"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --target "$target" "megatron-core==$version"
touch "$target/ready"
