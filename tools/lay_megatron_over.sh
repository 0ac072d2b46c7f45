#!/usr/bin/env bash
# Download another release of megatron-core, for PYTHONPATH: lay_megatron_over.sh VENV VERSION
#
# VENV/megatron-core-VERSION will hold only that wheel, and the file `ready` once it is complete. On
# PYTHONPATH it comes before the installed release and uses the installed torch.
set -euo pipefail
. tools/environments.sh

venv=$1 version=$2
target=$venv/megatron-core-$version

choose_installer "$venv/bin/python"
uv=$venv/bin/uv
rm -rf "$target"
install "$venv" --no-deps --target "$target" "megatron-core==$version"
touch "$target/ready"
