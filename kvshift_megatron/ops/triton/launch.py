"""Launches of the Triton kernels of the shift: keys and values in one launch."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from kvshift_megatron.ops.autograd import empty
from kvshift_megatron.ops.triton.kernels import shift_backward_kernel, shift_kernel

# Elements and warps of a program's tile: for bf16, each thread issues 4 loads of 16 bytes.
_TILE, _WARPS = 4096, 4
_LONGEST_AXIS = 65535  # of a grid, but for the first one


def forward(
    inputs: Sequence[Tensor], taps: Sequence[Tensor], position: Tensor | None
) -> list[Tensor]:
    """Return `shift_ref` of one or two [s, b, ng, hn] of the same shape and dtype.

    Args:
        inputs: bf16, fp16 or fp32; any strides.
        taps: as many fp32 [window, ng].
        position: int [s], or None.
    """
    outputs = [empty(x) for x in inputs]
    grid, sizes, constants = _launch(inputs, taps, position)
    arguments = [(*strided(x), out, tap.contiguous()) for x, out, tap in zip(inputs, outputs, taps)]
    with torch.cuda.device_of(inputs[0]):
        shift_kernel[grid](
            *arguments[0],
            *arguments[-1],
            inputs[0] if position is None else position.contiguous(),
            *sizes,
            **constants,
        )
    return outputs


def backward(
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    position: Tensor | None,
    output_grads: Sequence[Tensor],
) -> list[Tensor]:
    """Return the gradients of the inputs, then those of the taps."""
    grads = [empty(x) for x in inputs]
    grid, sizes, constants = _launch(inputs, taps, position)
    # One sum of each block of tokens of each sample.
    shape = (len(taps), *taps[0].shape, grid[0] * grid[1] // inputs[0].size(2))
    partial = torch.empty(shape, dtype=torch.float32, device=inputs[0].device)
    arguments = [
        (*strided(x), *strided(dy), dx, tap.contiguous(), dtap)
        for x, dy, dx, tap, dtap in zip(inputs, output_grads, grads, taps, partial)
    ]
    with torch.cuda.device_of(inputs[0]):
        shift_backward_kernel[grid](
            *arguments[0],
            *arguments[-1],
            inputs[0] if position is None else position.contiguous(),
            *sizes,
            **constants,
        )
    return grads + list(partial.sum(-1))


def _launch(
    inputs: Sequence[Tensor], taps: Sequence[Tensor], position: Tensor | None
) -> tuple[tuple[int, int, int], tuple[int, int, int], dict[str, Any]]:
    """Return (grid, (tokens, samples, groups), the kernels' compile-time constants)."""
    tokens, samples, groups, head = inputs[0].shape
    block_d = triton.next_power_of_2(head)
    block_s = max(1, _TILE // block_d)
    grid, one_axis = grid_of(triton.cdiv(tokens, block_s), samples * groups, len(inputs))
    constants = {
        "HEAD": head,
        "WINDOW": len(taps[0]),
        "PACKED": position is not None,
        "BLOCK_S": block_s,
        "BLOCK_D": block_d,
        "ONE_AXIS": one_axis,
        "num_warps": _WARPS,
    }
    return grid, (tokens, samples, groups), constants


def grid_of(blocks: int, heads: int, tensors: int) -> tuple[tuple[int, int, int], bool]:
    """Return (a grid, whether its first axis counts heads too, the kernels' ONE_AXIS).

    Only the first axis may be longer than _LONGEST_AXIS. Kernels that have to divide its index need
    a few registers more, which some GPUs lack.
    """
    if heads <= _LONGEST_AXIS:
        return (blocks, heads, tensors), False
    return (blocks * heads, 1, tensors), True


def strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Return x [s, b, ng, hn], copied if the kernels cannot read it, and its first strides."""
    # They count the elements between groups in 32 bits.
    if x.stride(-1) != 1 or x.stride(2) * x.size(2) >= 2**31:
        x = x.contiguous()
    tokens, samples, groups, _ = x.stride()
    return x, tokens, samples, groups
