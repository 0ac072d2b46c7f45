"""A trial of the Triton kernels on a device, before they are first chosen there."""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kvshift_megatron.ops import eager
from kvshift_megatron.ops.reference import rotate

# Twice the rounding error; a wrong kernel has an error of about 1.
_TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
_SHAPE = (37, 2, 3, 64)
_POSITION = (*range(20), *range(1), *range(16))
_ROTARY = 48


def self_check(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None if the kernels compute the right numbers, else a sentence on what is wrong.

    Forward and backward passes run with and without rotated keys; the result is cached for each
    device and dtype. Where no kernel can run, return None and cache nothing: without the device
    (tensors without data), while torch.compile traces, and while a CUDA graph is captured.

    Args:
        device: where the kernels are to run; a CPU only for Triton's interpreter.
        dtype: bf16, fp16 or fp32.
    """
    device = torch.device(device)
    if device.type == "meta" or torch.compiler.is_compiling():
        return None
    index = 0
    if device.type == "cuda":
        if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
            return None
        index = torch.cuda.current_device() if device.index is None else device.index
    return _checked(device.type, index, dtype)


@functools.cache
def _checked(device_type: str, index: int, dtype: torch.dtype) -> str | None:
    device = torch.device(device_type, index)
    # Real tensors, uncounted, even if the caller is in a mode that fakes or counts operations.
    with _disable_current_modes(), torch.inference_mode():
        for name, rope in (("the shift", False), ("the shift with rotated keys", True)):
            for packed in (False, True):
                try:
                    worst = _worst(device, dtype, rope, packed)
                except Exception as error:
                    first = str(error).strip().splitlines()[:1] or [type(error).__name__]
                    return f"the Triton kernels of {name} do not run on {device}: {first[0]}"
                # Not `worst >`: a NaN has to fail.
                if not worst <= _TOLERANCE[dtype]:
                    return (
                        f"the Triton kernels of {name} are wrong on {device} in {dtype}: a trial "
                        f"on small {'packed ' * packed}tensors is off by {worst:.1e}"
                    )
    return None


def _worst(device: torch.device, dtype: torch.dtype, rope: bool, packed: bool) -> float:
    """Return the largest relative error of the outputs and all gradients, against float64."""
    from kvshift_megatron.ops.triton import launch, rope_launch

    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(4, *_SHAPE, generator=generator, device="cpu").to(dtype)
    taps = list(torch.randn(2, 2, _SHAPE[2], generator=generator, device="cpu"))
    position = torch.tensor(_POSITION, device="cpu") if packed else None
    freqs = torch.rand(_SHAPE[0], _ROTARY // 2, generator=generator, device="cpu") * 6
    freqs = freqs.repeat_interleave(2, -1) if packed else freqs.repeat(1, 2)
    inputs, grads = mixed.double()[:2].unbind(), mixed.double()[2:].unbind()
    taps_wide = [tap.double() for tap in taps]
    outputs = eager.forward(inputs, taps_wide, position)
    if rope:
        outputs[0] = rotate(outputs[0], freqs, position, packed, 1.5)
        # The transpose of a rotation is its inverse.
        grads = (rotate(grads[0], -freqs, position, packed, 1.5), grads[1])
    expected = [*outputs, *eager.backward(inputs, taps_wide, position, grads)]

    mixed, freqs, taps = mixed.to(device), freqs.to(device), [tap.to(device) for tap in taps]
    position = None if position is None else position.to(device)
    inputs, grads = mixed[:2].unbind(), mixed[2:].unbind()
    kernels: ModuleType = launch
    arguments: tuple[Any, ...] = (inputs, taps, position)
    if rope:
        # The trial of packed documents is also that of interleaved channels.
        kernels, arguments = rope_launch, (*arguments, freqs, position, packed, 1.5)
    found = [*kernels.forward(*arguments), *kernels.backward(*arguments, grads)]
    errors = [_relative_error(x, y) for x, y in zip(found, expected, strict=True)]
    return max(errors, key=lambda error: float("inf") if error != error else error)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.cpu().double() - expected).norm() / expected.norm())
