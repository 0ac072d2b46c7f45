#!/usr/bin/env bash
# Renew the lists of exact versions: lock.sh [PACKAGE...|all]
#
# Versions that pyproject.toml and held.in still allow are kept, except that those of the named
# packages (or of all) become the newest. A second call changes nothing. uv resolves for Python 3.12
# and 3.13 and for every platform at once.
set -euo pipefail
. tools/environments.sh

upgrade=
for package in "$@"; do
    [ "$package" = all ] && upgrade="$upgrade --upgrade" && continue
    upgrade="$upgrade --upgrade-package=$package"
done

INSTALLER=uv begin_environment .venv-lock
rm -f .venv-lock/unfinished

new=$(mktemp -d "$requirements/.lock.XXXXXX")
trap 'rm -rf "$new"' EXIT
cp "$requirements"/*.txt "$new"

# compile LIST ARGUMENT... SOURCE: uv prefers the versions that are already in LIST.
compile() {
    local list=$new/$1 source=${*: -1}
    # shellcheck disable=SC2086
    "$uv" pip compile --quiet --universal --python-version 3.12 --no-annotate --no-header \
        --output-file "$list" $upgrade "${@:2}" >/dev/null
    # uv lists at the end, in comments, what it left out.
    { echo "# Made by \`make lock\` from $source." && sed '/^#/,$d' "$list"; } >"$list.new"
    mv "$list.new" "$list"
}

compile dev.txt --extra dev --constraint "$requirements/held.in" pyproject.toml
# The environment of Transformer Engine sees the development environment's packages. Listed is only
# what it adds or has in another version: the release of Transformers in te.in and what it needs.
grep -Ev '^(transformers|tokenizers|huggingface-hub)==' "$new/dev.txt" >"$new/shared"
shared=$(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package=\1/p' "$new/shared")
# shellcheck disable=SC2086
compile te.txt --constraint "$new/shared" $shared "$requirements/te.in"
compile te-alone.txt --no-deps "$requirements/te-alone.in"

# A list that did not change keeps its date, so that make has nothing to do for it.
for list in dev te te-alone; do
    cmp -s "$new/$list.txt" "$requirements/$list.txt" ||
        mv "$new/$list.txt" "$requirements/$list.txt"
done
