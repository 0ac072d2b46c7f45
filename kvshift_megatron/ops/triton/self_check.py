"""A trial of the Triton kernels on the device at hand, before they are first chosen there."""

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kvshift_megatron.ops import eager
from kvshift_megatron.ops.rope_reference import rotate

# Twice what rounding alone gives; a wrong kernel is off by about 1.
_TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
_SHAPE = (37, 2, 3, 64)
_POSITION = (*range(20), *range(1), *range(16))
_ROTARY = 48


def self_check(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where forward and backward, plain and with rotated keys, give the right numbers.

    Otherwise one sentence on what differs. The answer is kept for each device and dtype. Nothing
    runs, None is returned and nothing is kept where nothing can run: without that device (tensors
    without data), while torch.compile traces, and while a CUDA graph is captured.

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
    # Real tensors, whoever asks: a mode that fakes or counts operations is not meant here.
    with _disable_current_modes(), torch.inference_mode():
        for name, rope in (("the shift", False), ("the shift with rotated keys", True)):
            for packed in (False, True):
                try:
                    worst = _worst(device, dtype, rope, packed)
                except Exception as error:
                    first = str(error).strip().splitlines()[:1] or [type(error).__name__]
                    return f"the Triton kernels of {name} do not run on {device}: {first[0]}"
                # Written so that a NaN fails.
                if not worst <= _TOLERANCE[dtype]:
                    return (
                        f"the Triton kernels of {name} are wrong on {device} in {dtype}: a trial "
                        f"on small {'packed ' * packed}tensors is off by {worst:.1e}"
                    )
    return None


def _worst(device: torch.device, dtype: torch.dtype, rope: bool, packed: bool) -> float:
    """The largest relative error of the outputs and of all gradients, against float64."""
    from kvshift_megatron.ops.triton import launch, rope_launch

    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(4, *_SHAPE, generator=generator, device="cpu").to(dtype)
    taps = torch.randn(2, 2, _SHAPE[2], generator=generator, device="cpu").unbind()
    position = torch.tensor(_POSITION, device="cpu") if packed else None
    freqs = torch.rand(_SHAPE[0], _ROTARY // 2, generator=generator, device="cpu") * 6
    freqs = freqs.repeat_interleave(2, -1) if packed else freqs.repeat(1, 2)
    inputs, grads = mixed.double()[:2].unbind(), mixed.double()[2:].unbind()
    taps_wide = [tap.double() for tap in taps]
    outputs = eager.forward(inputs, taps_wide, position)
    if rope:
        outputs[0] = rotate(outputs[0], freqs, position, packed, 1.5)
        # The transpose of a rotation is the rotation backwards.
        grads = (rotate(grads[0], -freqs, position, packed, 1.5), grads[1])
    expected = [*outputs, *eager.backward(inputs, taps_wide, position, grads)]

    on_device = [None if x is None else x.to(device) for x in (mixed, *taps, position, freqs)]
    mixed, *taps, position, freqs = on_device
    inputs, grads = mixed[:2].unbind(), mixed[2:].unbind()
    module, arguments = launch, (inputs, taps, position)
    if rope:
        # Packed documents and interleaved channels in one trial.
        module, arguments = rope_launch, (*arguments, freqs, position, packed, 1.5)
    found = [*module.forward(*arguments), *module.backward(*arguments, grads)]
    errors = [_relative_error(x, y) for x, y in zip(found, expected, strict=True)]
    return max(errors, key=lambda error: float("inf") if error != error else error)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.cpu().double() - expected).norm() / expected.norm())
