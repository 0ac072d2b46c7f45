"""Launches of the Triton kernels that shift keys and values and rotate the keys in one pass."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from kvshift_megatron.ops.autograd import empty
from kvshift_megatron.ops.triton.launch import grid_of, strided
from kvshift_megatron.ops.triton.rope_kernels import rope_shift_backward_kernel, rope_shift_kernel

_WARPS = 4
# A program's tile: so many elements of each half of the rotary channels (16 bytes a thread for
# bf16), unless whole heads would exceed _TILE elements. At most _HEADS heads share a token's sines.
_HALF_TILE, _TILE, _HEADS = 1024, 4096, 4


def forward(
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    position: Tensor | None,
    freqs: Tensor,
    freq_index: Tensor | None,
    interleaved: bool,
    mscale: float,
) -> list[Tensor]:
    """Return `rope_shift_ref` of keys, or of keys and values; contiguous.

    Args:
        inputs: one or two [s, b, ng, hn] of the same shape and dtype (bf16, fp16 or fp32).
        taps: as many fp32 [window, ng].
        position, freq_index: int [s], or None.
        freqs: fp32 [positions, rotary].
        interleaved, mscale: as in `kv_shift_rope`.
    """
    outputs = [empty(x) for x in inputs]
    grid, constants = _launch(inputs, taps, position, freqs, freq_index, interleaved)
    arguments = [(*strided(x), out, tap.contiguous()) for x, out, tap in zip(inputs, outputs, taps)]
    with torch.cuda.device_of(inputs[0]):
        rope_shift_kernel[grid](
            *arguments[0],
            *arguments[-1],
            *_common(inputs[0], position, freqs, freq_index, mscale),
            **constants,
        )
    return outputs


def backward(
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    position: Tensor | None,
    freqs: Tensor,
    freq_index: Tensor | None,
    interleaved: bool,
    mscale: float,
    output_grads: Sequence[Tensor],
) -> list[Tensor]:
    """Return the gradients of the inputs, then those of the taps."""
    grads = [empty(x) for x in inputs]
    grid, constants = _launch(inputs, taps, position, freqs, freq_index, interleaved)
    # One sum of each block of tokens of each sample.
    shape = (len(taps), *taps[0].shape, grid[0] * grid[1] * constants["HEADS"] // inputs[0].size(2))
    partial = torch.empty(shape, dtype=torch.float32, device=inputs[0].device)
    arguments = [
        (*strided(x), *strided(dy), dx, tap.contiguous(), dtap)
        for x, dy, dx, tap, dtap in zip(inputs, output_grads, grads, taps, partial)
    ]
    with torch.cuda.device_of(inputs[0]):
        rope_shift_backward_kernel[grid](
            *arguments[0],
            *arguments[-1],
            *_common(inputs[0], position, freqs, freq_index, mscale),
            **constants,
        )
    return grads + list(partial.sum(-1))


def _launch(
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    position: Tensor | None,
    freqs: Tensor,
    freq_index: Tensor | None,
    interleaved: bool,
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Return (grid, the kernels' compile-time constants)."""
    tokens, samples, groups, head = inputs[0].shape
    rotary = freqs.size(-1)
    block_d, block_h = triton.next_power_of_2(head), triton.next_power_of_2(rotary // 2)
    block_s = max(1, min(_HALF_TILE // block_h, _TILE // block_d))
    heads = math.gcd(samples * groups, _HEADS)
    blocks = triton.cdiv(tokens, block_s)
    grid, one_axis = grid_of(blocks, samples * groups // heads, len(inputs))
    constants = {
        "HEAD": head,
        "ROTARY": rotary,
        "INTERLEAVED": interleaved,
        "WINDOW": len(taps[0]),
        "PACKED": position is not None,
        "INDEXED": freq_index is not None,
        "HEADS": heads,
        "BLOCK_S": block_s,
        "BLOCK_D": block_d,
        "BLOCK_H": block_h,
        "BLOCK_P": triton.next_power_of_2(max(1, head - rotary)),
        "ONE_AXIS": one_axis,
        "num_warps": _WARPS,
    }
    return grid, constants


def _common(
    x: Tensor, position: Tensor | None, freqs: Tensor, freq_index: Tensor | None, mscale: float
) -> tuple[Any, ...]:
    """Return the arguments that keys and values share; x stands in for an index that is None."""
    if freqs.stride(-1) != 1:
        freqs = freqs.contiguous()
    return (
        freqs,
        freqs.stride(0),
        freqs.size(0),
        x if freq_index is None else freq_index.contiguous(),
        float(mscale),
        x if position is None else position.contiguous(),
        *x.shape[:3],
    )
