#!/usr/bin/env bash
# Make the environment of `make test-te`: make_te_venv.sh DIRECTORY VENV WHEELS
#
# DIRECTORY is made from scratch with the interpreter of VENV, and sees VENV's packages (PyTorch,
# Megatron-Core), so that it takes 0.9 GB rather than 6. WHEELS is a folder with a built
# transformer_engine_torch, of which the package index has only the source. The versions are those of
# tools/requirements/te.txt and te-alone.txt.
set -euo pipefail
. tools/environments.sh

te_venv=$1
venv=$2
wheels=$3

te_version=$(sed -n 's/^transformer-engine-torch==//p' "$requirements/te-alone.txt")

if ! "$venv/bin/python" -m pip install --quiet --dry-run --ignore-installed --no-index \
    --only-binary :all: --no-deps --find-links "$wheels" \
    "transformer_engine_torch==$te_version" >/dev/null 2>&1; then
    torch=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))')
    echo "No wheel of transformer_engine_torch $te_version for" \
        "$("$venv/bin/python" --version) on $(uname -sm) in '$wheels'" \
        "(set TE_WHEELS= to use another folder): build one against torch $torch by" \
        "'$venv/bin/python -m pip wheel --no-deps --no-build-isolation" \
        "transformer_engine_torch==$te_version' (20 minutes on 2 cores), and put it there." >&2
    exit 1
fi

choose_installer "$venv/bin/python"
uv=$venv/bin/uv
echo "making $te_venv with $installer: 0.4 GB to download, 0.9 GB on disk"
"$venv/bin/python" -m venv --clear "$te_venv"
share_packages "$te_venv" "$venv"

# Without dependencies: the lists are complete, together with VENV's packages.
install "$te_venv" --no-deps --requirement "$requirements/te.txt"
install "$te_venv" --no-deps --find-links "$wheels" --only-binary transformer-engine-torch \
    --requirement "$requirements/te-alone.txt"

# Transformer Engine looks for cuDNN beside itself.
here=$(site_packages "$te_venv")
if [ ! -e "$here/nvidia" ]; then
    ln -s "$(cd "$(site_packages "$venv")" && pwd)/nvidia" "$here/nvidia"
fi

"$te_venv/bin/python" -c '
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
import megatron.bridge.models.gpt_provider
assert HAVE_TE, "Megatron does not find Transformer Engine"
' 2>"$te_venv/import.log" || {
    tail -n 5 "$te_venv/import.log" >&2
    echo "Transformer Engine $te_version was installed from '$wheels' but cannot be imported: the" \
        "wheel must be built against the torch of $venv." >&2
    exit 1
}
finish_environment "$te_venv"
