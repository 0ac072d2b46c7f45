#!/usr/bin/env bash
# Make an environment of `make test-transformers`: make_transformers_venv.sh DIRECTORY VENV RELEASE
#
# RELEASE is one of Transformers. DIRECTORY is made from scratch with the interpreter of VENV, and sees
# VENV's packages: only Transformers and what that release needs in another version are installed (120
# MB on disk). pip installs, as it can see VENV's packages.
set -euo pipefail
. tools/environments.sh

target=$1 venv=$2 release=$3

add() {
    "$venv/bin/python" -m pip --python "$target" install --disable-pip-version-check \
        --progress-bar off "$@" >>"$target/pip.log" 2>&1 || {
        grep '^ *ERROR' "$target/pip.log" >&2 || true
        echo "pip could not install $*: see its output in $target/pip.log" >&2
        return 1
    }
}

echo "making $target with Transformers $release"
"$venv/bin/python" -m venv --clear --without-pip "$target"
# VENV's packages become visible only after that, or pip would be content with VENV's Transformers.
add --no-deps "transformers==$release"
share_packages "$target" "$venv"
# Packages that need a later Transformers are not used there: pip's complaint stays in the log.
add "transformers==$release"
