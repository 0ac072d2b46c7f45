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
    first = inputs[0]
    kind = (first.device.type, first.dtype)
    alike = all(x.shape == first.shape and (x.device.type, x.dtype) == kind for x in inputs)
    return _choose(os.environ.get(VARIABLE, "auto"), *kind, alike)


def take_reference(reason: str) -> None:
    """Note that only the reference can serve; refuse where another one is forced."""
    if os.environ.get(VARIABLE) == "triton":
        raise ValueError(f"{VARIABLE}=triton: {reason}: set it to auto or reference")
    _log("reference", reason)


@functools.cache
def _choose(wanted: str, device: str, dtype: torch.dtype, alike: bool) -> str:
    # Cached: every layer asks in every pass.
    if wanted not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"{VARIABLE} must be auto, reference or triton, not {wanted!r}")
    # Triton's interpreter is for tests, which ask for it by name.
    interpreted = wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    obstacle = _why_not_triton(device, dtype, alike, interpreted)
    if wanted == "triton" and obstacle:
        raise ValueError(f"{VARIABLE}=triton: {obstacle}: set it to auto or reference")
    name = "reference" if wanted == "reference" or obstacle else "triton"
    reason = obstacle or f"{dtype} on a GPU"
    _log(name, reason if wanted == "auto" else f"{VARIABLE}={wanted}")
    return name


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
    if not torch.compiler.is_compiling():
        logger.info("kvshift_megatron: implementation of the shift: %s (%s)", name, reason)
