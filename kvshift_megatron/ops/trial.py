"""Run kernels once on small random tensors and compare them with the definition in float64."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kvshift_megatron.ops import eager
from kvshift_megatron.ops.reference import rotate

# Twice the rounding error; a wrong kernel has an error of about 1.
_TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
_DOCUMENTS = (20, 1, 16)
_MSCALE = 1.5


class Trial(NamedTuple):
    """What is tried.

    Args:
        forward, backward: The kernels' functions.
        packed: Whether the tokens belong to several documents; then rotated channels are
            interleaved.
        rotary: Rotated channels; 0 for kernels that only shift.
        repeats: How often the tokens are repeated.
        name: Of this way to run the kernels, for messages; it may be empty.
    """

    forward: Callable[..., Sequence[Tensor]]
    backward: Callable[..., Sequence[Tensor]]
    packed: bool = False
    rotary: int = 0
    repeats: int = 1
    name: str = ""


def why_wrong(
    kernels: str, trials: Sequence[Trial], device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return a clause if a trial fails, None if all of them give the right numbers.

    Real tensors are used, and not counted, in whatever mode the caller is.
    """
    with _disable_current_modes(), torch.inference_mode():
        for trial in trials:
            try:
                worst = largest_error(trial, device, dtype)
            except Exception as error:
                first = str(error).strip().splitlines()[:1] or [type(error).__name__]
                return f"{kernels} do not run on {device}: {first[0]}"
            # Not `worst >`: a NaN has to fail.
            if not worst <= _TOLERANCE[dtype]:
                kind = " ".join(filter(None, [trial.name, "packed" * trial.packed, "tensors"]))
                return (
                    f"{kernels} are wrong on {device} in {dtype}: a trial on small {kind} is off "
                    f"by {worst:.1e}"
                )
    return None


def largest_error(trial: Trial, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest relative error of the outputs and all gradients, against float64."""
    tokens = sum(_DOCUMENTS) * trial.repeats
    groups = 3
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(4, tokens, 2, groups, 64, generator=generator, device="cpu").to(dtype)
    taps = list(torch.randn(2, 2, groups, generator=generator, device="cpu"))
    position = None
    if trial.packed:
        documents = [torch.arange(length, device="cpu") for length in _DOCUMENTS]
        position = torch.cat(documents * trial.repeats)
    inputs, grads = mixed.double()[:2].unbind(), mixed.double()[2:].unbind()
    taps_wide = [tap.double() for tap in taps]
    outputs = eager.forward(inputs, taps_wide, position)
    settings: tuple[Any, ...] = ()
    if trial.rotary:
        freqs = torch.rand(tokens, trial.rotary // 2, generator=generator, device="cpu") * 6
        freqs = freqs.repeat_interleave(2, -1) if trial.packed else freqs.repeat(1, 2)
        outputs[0] = rotate(outputs[0], freqs, position, trial.packed, _MSCALE)
        # The transpose of a rotation is its inverse.
        grads = (rotate(grads[0], -freqs, position, trial.packed, _MSCALE), grads[1])
        places = None if position is None else position.to(device)
        settings = freqs.to(device), places, trial.packed, _MSCALE
    expected = [*outputs, *eager.backward(inputs, taps_wide, position, grads)]

    mixed, taps = mixed.to(device), [tap.to(device) for tap in taps]
    position = None if position is None else position.to(device)
    arguments = (mixed[:2].unbind(), taps, position, *settings)
    found = [*trial.forward(*arguments), *trial.backward(*arguments, mixed[2:].unbind())]
    errors = [_relative_error(x, y) for x, y in zip(found, expected, strict=True)]
    return max(errors, key=lambda error: float("inf") if error != error else error)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.cpu().double() - expected).norm() / expected.norm())
