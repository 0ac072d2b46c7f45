#!/usr/bin/env bash
# An environment with another release of Transformers: make_transformers_venv.sh DIRECTORY VENV SPEC
#
# DIRECTORY is made anew, with the interpreter of VENV, and sees VENV's packages: only Transformers
# and what that release wants in another version are installed (40 MB). SPEC is a requirement, such
# as transformers==5.0.0.
set -euo pipefail

target=$1 venv=$2 spec=$3

"$venv/bin/python" -m venv --clear --without-pip "$target"
site() {
    "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}
# addsitedir and not the bare path: it also reads the .pth files there (this package's own).
echo "import site; site.addsitedir('$(site "$venv")')" >"$(site "$target")/shared.pth"
"$venv/bin/python" -m pip --python "$target" --quiet --disable-pip-version-check install "$spec"
