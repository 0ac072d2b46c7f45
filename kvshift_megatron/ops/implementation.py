"""Which implementation of the shift runs, and why."""

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# auto, or one of IMPLEMENTATIONS.
VARIABLE = "KVSHIFT_IMPLEMENTATION"
IMPLEMENTATIONS = ("reference", "triton")

HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def implementation(inputs: Sequence[Tensor]) -> str:
    """The implementation for keys and values, or one of them; logged when it is first chosen.

    Raises:
        ValueError: KVSHIFT_IMPLEMENTATION names one that does not exist, or cannot take them.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"{VARIABLE} must be auto, reference or triton, not {wanted!r}")
    kinds = {(x.device.type, x.dtype, x.shape) for x in inputs}
    device, dtype = inputs[0].device.type, inputs[0].dtype
    # Triton's interpreter is for tests, which ask for it by name.
    interpreted = wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    obstacle = _why_not_triton(device, dtype, len(kinds) == 1, interpreted)
    if wanted == "triton" and obstacle:
        raise ValueError(f"{VARIABLE}=triton: {obstacle}: set it to auto or reference")
    name = "reference" if wanted == "reference" or (wanted == "auto" and obstacle) else "triton"
    asked = f"{VARIABLE}={wanted}"
    if not torch.compiler.is_compiling():
        _log(name, asked if wanted != "auto" else obstacle or f"{dtype} on a GPU")
    return name


def take_reference(reason: str) -> None:
    """Note that only the reference can serve; refuse where another one is forced."""
    if os.environ.get(VARIABLE) == "triton":
        raise ValueError(f"{VARIABLE}=triton: {reason}: set it to auto or reference")
    if not torch.compiler.is_compiling():
        _log("reference", reason)


@functools.cache
def _why_not_triton(device: str, dtype: torch.dtype, alike: bool, interpreted: bool) -> str | None:
    # Tensors without data stand for a GPU's: their memory is what is asked about.
    if device not in ("cuda", "meta") and not interpreted:
        return f"the tensors are on the {device} device, not on a GPU"
    if dtype not in _TRITON_DTYPES:
        return f"the kernels are for bf16, fp16 and fp32, not {dtype}"
    if not alike:
        return "the kernels take keys and values of one shape, dtype and device"
    if not HAS_TRITON:
        return "triton is not installed"
    return None


@functools.cache
def _log(name: str, reason: str) -> None:
    logger.info("kvshift_megatron: implementation of the shift: %s (%s)", name, reason)
