#!/usr/bin/env bash
# Renews the lists of exact versions: lock.sh [PACKAGE...|all]
#
# Versions that pyproject.toml and held.in still allow are kept, but those of the named packages, or
# all of them, become the newest. The same call again changes nothing. uv resolves, for Python 3.12
# and 3.13 and every platform at once.
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

# compile LIST ARGUMENT... SOURCE: uv prefers what is in LIST already.
compile() {
    local list=$new/$1 source=${*: -1}
    # shellcheck disable=SC2086
    "$uv" pip compile --quiet --universal --python-version 3.12 --no-annotate --no-header \
        --output-file "$list" $upgrade "${@:2}" >/dev/null
    # uv names what it left out, at the end.
    { echo "# Made by \`make lock\` from $source." && sed '/^#/,$d' "$list"; } >"$list.new"
    mv "$list.new" "$list"
}

compile dev.txt --extra dev --constraint "$requirements/held.in" pyproject.toml
# The environment of Transformer Engine sees the other's packages: only what it adds is listed, or has
# otherwise, which is the release of Transformers in te.in and what goes with it.
grep -Ev '^(transformers|tokenizers|huggingface-hub)==' "$new/dev.txt" >"$new/shared"
shared=$(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package=\1/p' "$new/shared")
# shellcheck disable=SC2086
compile te.txt --constraint "$new/shared" $shared "$requirements/te.in"
compile te-alone.txt --no-deps "$requirements/te-alone.in"

# A list that stays as it was keeps its date, and make does nothing for it.
for list in dev te te-alone; do
    cmp -s "$new/$list.txt" "$requirements/$list.txt" ||
        mv "$new/$list.txt" "$requirements/$list.txt"
done
