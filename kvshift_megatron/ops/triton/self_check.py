"""A trial of the Triton kernels on a device, before they are first chosen there."""

import functools
from types import ModuleType

import torch

from kvshift_megatron.ops.trial import Trial, why_wrong

_ROTARY = 48


def self_check(device: torch.device | str, dtype: torch.dtype, operator: str) -> str | None:
    """Return None if the kernels compute the right numbers, else a sentence on what is wrong.

    Forward and backward passes run; the result is cached for each device, dtype and operator. If
    no kernel can run now (`can_try`), return None and cache nothing.

    Args:
        device: where the kernels are to run; a CPU only for Triton's interpreter.
        dtype: bf16, fp16 or fp32.
        operator: "shift", or "rope_shift", which also rotates the keys.
    """
    device = torch.device(device)
    if not can_try(device):
        return None
    index = 0
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    return _checked(device.type, index, dtype, operator)


def can_try(device: torch.device) -> bool:
    """Whether kernels can run on the device now.

    They cannot without it (tensors without data), while torch.compile traces, and while a CUDA
    graph is captured.
    """
    if device.type == "meta" or torch.compiler.is_compiling():
        return False
    if device.type == "cuda":
        return torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()
    return True


@functools.cache
def _checked(device_type: str, index: int, dtype: torch.dtype, operator: str) -> str | None:
    from kvshift_megatron.ops.triton import launch, rope_launch

    kernels: ModuleType = launch
    rotary, name = 0, "the shift"
    if operator == "rope_shift":
        kernels, rotary, name = rope_launch, _ROTARY, "the shift with rotated keys"
    trials = [Trial(kernels.forward, kernels.backward, packed, rotary) for packed in (False, True)]
    device = torch.device(device_type, index)
    return why_wrong(f"the Triton kernels of {name}", trials, device, dtype)
