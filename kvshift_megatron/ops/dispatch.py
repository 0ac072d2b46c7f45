"""Which implementation of the shift runs, and why."""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# auto, or the name of an implementation.
VARIABLE = "KVSHIFT_IMPLEMENTATION"
# Operator -> implementation -> the module with its `forward` and `backward`. Imported late, as
# Triton may not be installed.
MODULES = {
    "shift": {"eager": "eager", "cpu": "cpu.kernel", "triton": "triton.launch"},
    "rope_shift": {"triton": "triton.rope_launch"},
}

HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def requested() -> str:
    """Return the value of KVSHIFT_IMPLEMENTATION; auto if it is not set."""
    wanted = os.environ.get(VARIABLE, "auto")
    return "eager" if wanted == "reference" else wanted  # its old name


def implementation(x: Tensor) -> str:
    """Return the implementation for keys or values like x; log it the first time.

    Raises:
        ValueError: KVSHIFT_IMPLEMENTATION names one that does not exist or cannot take them.
    """
    return _choose(requested(), x.device, x.dtype)


@functools.cache
def kernels(operator: str, name: str) -> ModuleType:
    """Return the module of an implementation's `forward` and `backward` for this operator."""
    return importlib.import_module(f"{__package__}.{MODULES[operator][name]}")


@functools.cache
def _choose(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    # Cached: every layer asks in every pass.
    choices = MODULES["shift"]
    if wanted not in ("auto", *choices):
        raise ValueError(f"{VARIABLE} must be auto or one of {', '.join(choices)}, not {wanted!r}")
    if wanted == "eager":
        return _log(logging.INFO, "eager", f"{VARIABLE}=eager")
    best = wanted if wanted != "auto" else "cpu" if device.type == "cpu" else "triton"
    # Triton's interpreter is for tests, which ask for it by name.
    interpreted = wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    obstacle = None if interpreted and HAS_TRITON else why_not(best, device, dtype)
    if obstacle and wanted != "auto":
        raise ValueError(f"{VARIABLE}={wanted}: {obstacle}: set it to auto or eager")
    if obstacle:
        return _log(logging.WARNING, "eager", obstacle)
    reason = f"{dtype} on the {device.type} device" if wanted == "auto" else f"{VARIABLE}={wanted}"
    return _log(logging.INFO, best, reason)


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return a clause that says why kernels cannot shift such tensors; None if they can.

    Args:
        name: cpu or triton.
    """
    return (_why_not_cpu if name == "cpu" else _why_not_triton)(device, dtype)


def _why_not_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on the {device.type} device, not on a CPU"
    from kvshift_megatron.ops.cpu import kernel

    if not kernel.supports(dtype):
        return f"the compiled shift does not support {dtype}"
    return kernel.why_not()


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    # Tensors without data (meta) stand for a GPU's: a dry run asks for their memory.
    if device.type not in ("cuda", "meta"):
        return f"the tensors are on the {device.type} device, not on a GPU"
    if dtype not in _TRITON_DTYPES:
        return f"the kernels support bf16, fp16 and fp32, not {dtype}"
    if not HAS_TRITON:
        return "triton is not installed"
    # A plain import: Dynamo cannot trace importlib.
    from kvshift_megatron.ops.triton.self_check import self_check

    return self_check(device, dtype)


@functools.cache
def _log(level: int, name: str, reason: str) -> str:
    if not torch.compiler.is_compiling():
        logger.log(level, "kvshift_megatron: implementation of the shift: %s (%s)", name, reason)
    return name
