#!/usr/bin/env bash
# Makes the environment of `make test-te`: make_te_venv.sh DIRECTORY VENV WHEELS
#
# DIRECTORY is made anew, with the interpreter of VENV, and sees VENV's packages (PyTorch,
# Megatron-Core), so that it adds 0.5 GB and not 5. WHEELS is a folder with a built
# transformer_engine_torch: the package index has its source only.
set -euo pipefail

te_venv=$1
venv=$2
wheels=$3

te_version=2.20.2
bridge_version=0.6.2

pip() {
    "$1/bin/python" -m pip --quiet --disable-pip-version-check "${@:2}"
}

site_packages() {
    "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

from_wheels=(--no-index --only-binary :all: --no-deps --find-links "$wheels"
    "transformer_engine_torch==$te_version")

if ! pip "$venv" install --dry-run --ignore-installed "${from_wheels[@]}" >/dev/null 2>&1; then
    torch=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))')
    echo "No wheel of transformer_engine_torch $te_version for" \
        "$("$venv/bin/python" --version) on $(uname -sm) in '$wheels'" \
        "(TE_WHEELS= names another folder): build one, 20 minutes on 2 cores, by" \
        "'$venv/bin/python -m pip wheel --no-deps --no-build-isolation" \
        "transformer_engine_torch==$te_version' (against torch $torch), and put it there." >&2
    exit 1
fi

echo "making $te_venv (0.5 GB, minutes)"
"$venv/bin/python" -m venv --clear "$te_venv"
here=$(site_packages "$te_venv")
shared=$(cd "$(site_packages "$venv")" && pwd)
# addsitedir and not the bare path: it also reads the .pth files there (this package's own).
echo "import site; site.addsitedir('$shared')" >"$here/shared.pth"

pip "$te_venv" install einops onnxscript onnx pydantic omegaconf requests scipy "pulp<4"
# Without dependencies: these name builds of PyTorch and CUDA packages that are there already, and
# Megatron-Bridge dozens of packages that building a model does not need.
pip "$te_venv" install "${from_wheels[@]}"
pip "$te_venv" install --no-deps \
    "transformer-engine==$te_version" "transformer-engine-cu13==$te_version" \
    nvdlfw-inspect nvidia-cudnn-frontend nvidia-modelopt "megatron-bridge==$bridge_version"

# Transformer Engine looks for cuDNN beside itself.
if [ ! -e "$here/nvidia" ]; then
    ln -s "$shared/nvidia" "$here/nvidia"
fi

"$te_venv/bin/python" -c '
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
import megatron.bridge.models.gpt_provider
assert HAVE_TE, "Megatron does not find Transformer Engine"
' 2>"$te_venv/import.log" || {
    tail -n 5 "$te_venv/import.log" >&2
    echo "Transformer Engine $te_version was installed from '$wheels' and does not import: the" \
        "wheel must have been built against the torch of $venv." >&2
    exit 1
}
