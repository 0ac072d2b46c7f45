"""The shift by Triton kernels, as operators that autograd and torch.compile know."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from kvshift_megatron.ops.triton_kernels import shift_backward_kernel, shift_kernel

# Elements of a program's tile and its warps: 16 bytes a load and 4 loads a thread for bf16.
_TILE, _WARPS = 4096, 4


def triton_shift(
    inputs: Sequence[Tensor], taps: Sequence[Tensor], position: Tensor | None
) -> Sequence[Tensor]:
    """`shift_ref` of keys and values in one launch, or of one of them.

    Args:
        inputs: one or two [s, b, ng, hn] of one shape and dtype (bf16, fp16 or fp32), any strides.
        taps: as many fp32 [window, ng].
        position: int [s], or None.

    Returns:
        As many tensors: contiguous. For the backward pass the inputs are kept, and nothing else;
        copies of them where they are small parts of a tensor that would be kept whole.
    """
    inputs = [x.clone() if _keeps_much_else(x, len(inputs)) else x for x in inputs]
    if torch.compiler.is_compiling() or inputs[0].is_meta:
        return _shift_operator(list(inputs), list(taps), position)
    # A registered operator costs the host several times this, in every layer of every pass.
    return _Shift.apply(position, *inputs, *taps)


def _forward(
    inputs: Sequence[Tensor], taps: Sequence[Tensor], position: Tensor | None
) -> list[Tensor]:
    outputs = [_empty(x) for x in inputs]
    grid, sizes, constants = _launch(inputs, taps, position)
    arguments = [
        (*_strided(x), out, tap.contiguous()) for x, out, tap in zip(inputs, outputs, taps)
    ]
    with torch.cuda.device_of(inputs[0]):
        shift_kernel[grid](
            *arguments[0],
            *arguments[-1],
            inputs[0] if position is None else position.contiguous(),
            *sizes,
            **constants,
        )
    return outputs


def _backward(
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    position: Tensor | None,
    output_grads: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of the inputs, then those of the taps."""
    grads = [_empty(x) for x in inputs]
    grid, sizes, constants = _launch(inputs, taps, position)
    shape = (len(taps), *taps[0].shape, grid[0] * inputs[0].size(1))
    partial = torch.empty(shape, dtype=torch.float32, device=inputs[0].device)
    arguments = [
        (*_strided(x), *_strided(dy), dx, tap.contiguous(), dtap)
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


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, position, *inputs_and_taps):
        half = len(inputs_and_taps) // 2
        ctx.save_for_backward(position, *inputs_and_taps)
        return tuple(_forward(inputs_and_taps[:half], inputs_and_taps[half:], position))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *output_grads):
        position, *inputs_and_taps = ctx.saved_tensors
        half = len(output_grads)
        inputs, taps = inputs_and_taps[:half], inputs_and_taps[half:]
        return None, *_backward(inputs, taps, position, output_grads)


@torch.library.custom_op("kvshift_megatron::shift", mutates_args=())
def _shift_operator(
    inputs: Sequence[Tensor], taps: Sequence[Tensor], position: Tensor | None
) -> list[Tensor]:
    return _forward(inputs, taps, position)


@torch.library.custom_op("kvshift_megatron::shift_backward", mutates_args=())
def _backward_operator(
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    position: Tensor | None,
    output_grads: Sequence[Tensor],
) -> list[Tensor]:
    # An operator's results may not share memory, and the taps' gradients do.
    grads = _backward(inputs, taps, position, output_grads)
    return grads[: len(inputs)] + [grad.clone() for grad in grads[len(inputs) :]]


@_shift_operator.register_fake
def _(inputs, taps, position):
    return [_empty(x) for x in inputs]


@_backward_operator.register_fake
def _(inputs, taps, position, output_grads):
    return [_empty(x) for x in inputs] + [torch.empty_like(tap) for tap in taps]


def _keep_inputs(ctx, inputs, output) -> None:
    xs, taps, position = inputs
    ctx.count = len(xs)
    ctx.save_for_backward(*xs, *taps, position)


def _differentiate(ctx, output_grads: list[Tensor]):
    *tensors, position = ctx.saved_tensors
    inputs, taps = tensors[: ctx.count], tensors[ctx.count :]
    grads = _backward_operator(inputs, taps, position, list(output_grads))
    return grads[: ctx.count], grads[ctx.count :], None


_shift_operator.register_autograd(_differentiate, setup_context=_keep_inputs)


def _keeps_much_else(x: Tensor, count: int) -> bool:
    """Whether more than half of the memory behind x is none of the `count` inputs.

    With few query groups keys and values are little of mixed_qkv, which nothing else needs by then:
    a copy of them costs less than the queries.
    """
    return x.untyped_storage().nbytes() > 2 * count * x.numel() * x.element_size()


def _launch(inputs: Sequence[Tensor], taps: Sequence[Tensor], position: Tensor | None):
    """(grid, (tokens, samples, groups), the kernels' compile-time constants)."""
    tokens, samples, groups, head = inputs[0].shape
    block_d = triton.next_power_of_2(head)
    block_s = max(1, _TILE // block_d)
    constants = {
        "HEAD": head,
        "WINDOW": len(taps[0]),
        "PACKED": position is not None,
        "BLOCK_S": block_s,
        "BLOCK_D": block_d,
        "num_warps": _WARPS,
    }
    grid = (triton.cdiv(tokens, block_s), samples * groups, len(inputs))
    return grid, (tokens, samples, groups), constants


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x, *x.stride()[:3]


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
