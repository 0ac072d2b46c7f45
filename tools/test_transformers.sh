#!/usr/bin/env bash
# Run the tests that use Transformers on other releases of it:
# test_transformers.sh DIRECTORY VENV OPTIONS RELEASE...
#
# DIRECTORY gets one environment per release (`newest`: the newest that pyproject.toml allows, skipped
# if that is VENV's), and the folders that VENV's release exports once for all of them. OPTIONS are
# those of pytest, in one word.
set -euo pipefail

directory=$1 venv=$2 options=$3
shift 3

pinned=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("transformers"))')

# Print the newest release that pyproject.toml allows.
newest() {
    local allowed
    allowed=$(sed -n 's/.*"\(transformers>=[^"]*\)".*/\1/p' pyproject.toml)
    "$venv/bin/python" -m pip install --disable-pip-version-check --dry-run --quiet --no-deps \
        --ignore-installed --report - "$allowed" | "$venv/bin/python" -c 'import json, sys
print(json.load(sys.stdin)["install"][0]["metadata"]["version"])'
}

mkdir -p "$directory"
KVSHIFT_EXPORTED=$(cd "$directory" && pwd)/exported
export KVSHIFT_EXPORTED
rm -rf "$KVSHIFT_EXPORTED"
"$venv/bin/python" -m tests.hf.export "$KVSHIFT_EXPORTED" >"$directory/export.log" 2>&1 ||
    {
        cat "$directory/export.log" >&2
        exit 1
    }

results=() failed=
for release; do
    if [ "$release" = newest ]; then
        release=$(newest)
        if [ "$release" = "$pinned" ]; then
            results+=("$release: the newest is the pinned one, which make test runs")
            continue
        fi
    fi
    environment=$directory/$release
    [ -e "$environment/ready" ] ||
        bash tools/make_transformers_venv.sh "$environment" "$venv" "$release"
    touch "$environment/ready"
    status=0
    # shellcheck disable=SC2086
    "$environment/bin/python" -m pytest -p no:cacheprovider $options tests/hf tests/convert 2>&1 |
        tee "$directory/$release.log" || status=$?
    [ "$status" -eq 0 ] || failed=1
    results+=("$release: $(tail -n 1 "$directory/$release.log" | tr -d =)")
done
printf 'Transformers %s\n' "${results[@]}"
[ -z "$failed" ]
