#!/usr/bin/env bash
# Run the release matrix on a checkout of Megatron-LM: test_next.sh VENV CHECKOUT OPTIONS
#
# CHECKOUT is the folder that holds `megatron/`, where nothing is written. VENV/next, which is on
# PYTHONPATH, gets a link to that, bytecode, and Megatron's dataset helpers if the installed release's
# do not fit.
# OPTIONS are those of pytest, in one word.
set -euo pipefail

venv=$1 checkout=$2 options=$3

fail() {
    printf 'make test-next: %s\n' "$1" >&2
    exit 2
}

[ -n "$checkout" ] || fail "MEGATRON_PATH is not set: add MEGATRON_PATH=FOLDER, a checkout of Megatron-LM"
for file in megatron/core/package_info.py megatron/training/__init__.py; do
    [ -f "$checkout/$file" ] ||
        fail "MEGATRON_PATH=$checkout holds no $file: name the top folder of a checkout of Megatron-LM"
done
checkout=$(cd "$checkout" && pwd)

python=$(cd "$venv" && pwd)/bin/python
mkdir -p "$venv/next/path"
next=$(cd "$venv/next" && pwd)
# Not the checkout itself, whose tools/ and examples/ are not this project's.
path=$next/path
ln -sfn "$checkout/megatron" "$path/megatron"

# `kvshift_megatron.upstream.dataset_helpers` finds the compiled helpers along PYTHONPATH.
sources=megatron/core/datasets/helpers.cpp
installed=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if ! cmp -s "$checkout/$sources" "$installed/$sources"; then
    helpers=$next/helpers/$(sha256sum "$checkout/$sources" | cut -c 1-16)
    folder=$helpers/megatron/core/datasets
    suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    if [ ! -f "$folder/helpers_cpp$suffix" ]; then
        includes=$("$python" -m pybind11 --includes) ||
            fail "$checkout/$sources is not the installed release's, and to compile it needs pybind11: $python -m pip install pybind11"
        mkdir -p "$folder"
        # shellcheck disable=SC2086  # several options
        c++ -O3 -shared -std=c++17 -fPIC $includes "$checkout/$sources" \
            -o "$folder/unfinished" || fail "$checkout/$sources cannot be compiled (see above)"
        mv "$folder/unfinished" "$folder/helpers_cpp$suffix"
    fi
    path=$path:$helpers
fi

# The checkout stays as it is, without bytecode.
export PYTHONPYCACHEPREFIX=$next/bytecode
# In one word: pytest would take a folder by itself for one with tests.
# shellcheck disable=SC2086  # several options
PYTHONPATH=$path "$python" -m pytest -p no:cacheprovider "--megatron=$checkout" $options
