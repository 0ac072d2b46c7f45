"""The shift as one node of autograd and one operator, whichever implementation computes it.

For the backward pass the raw inputs and the taps are kept, and nothing else.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kvshift_megatron.ops.dispatch import functions, implementation


def shift(
    inputs: Sequence[Tensor], taps: Sequence[Tensor], position: Tensor | None
) -> list[Tensor]:
    """`shift_ref` of keys and values at once, or of one of them; differentiable.

    Args:
        inputs: one or two [s, b, ng, hn] of one shape, dtype and device; any strides.
        taps: as many [window, ng], fp32 (float64 for float64 inputs).
        position: int64 [s], on the same device, or None.

    Returns:
        As many new, contiguous tensors.
    """
    inputs = to_keep(inputs)
    if torch.compiler.is_compiling():
        return _shift_operator(inputs, list(taps), position)
    # A registered operator costs the host several times this, in every layer of every pass.
    return list(_Shift.apply(position, *inputs, *taps))


def forward(
    inputs: Sequence[Tensor], taps: Sequence[Tensor], position: Tensor | None
) -> list[Tensor]:
    """`shift` without autograd."""
    if has_no_data(inputs[0]):
        return _shift_operator(list(inputs), list(taps), position)
    return functions(inputs[0]).forward(inputs, taps, position)


def backward(
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    position: Tensor | None,
    output_grads: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of the inputs, then those of the taps, given those of the outputs."""
    if has_no_data(inputs[0]):
        return _backward_operator(list(inputs), list(taps), position, list(output_grads))
    return functions(inputs[0]).backward(inputs, taps, position, output_grads)


def to_keep(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs, or copies of them, as a backward pass should keep them.

    With few query groups keys and values are little of mixed_qkv, which nothing else needs by then
    (on a CPU the queries may be views of it still): a copy of them costs less than the queries.
    """
    if inputs[0].device.type == "cpu" or implementation(inputs[0]) != "triton":
        return list(inputs)
    return [x.clone() if _keeps_much_else(x, len(inputs)) else x for x in inputs]


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, position, *inputs_and_taps):
        half = len(inputs_and_taps) // 2
        ctx.save_for_backward(position, *inputs_and_taps)
        return tuple(forward(inputs_and_taps[:half], inputs_and_taps[half:], position))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *output_grads):
        position, *inputs_and_taps = ctx.saved_tensors
        half = len(output_grads)
        inputs, taps = inputs_and_taps[:half], inputs_and_taps[half:]
        return None, *backward(inputs, taps, position, output_grads)


@torch.library.custom_op("kvshift_megatron::shift", mutates_args=())
def _shift_operator(
    inputs: Sequence[Tensor], taps: Sequence[Tensor], position: Tensor | None
) -> list[Tensor]:
    return [x.contiguous() for x in forward(inputs, taps, position)]


@torch.library.custom_op("kvshift_megatron::shift_backward", mutates_args=())
def _backward_operator(
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    position: Tensor | None,
    output_grads: Sequence[Tensor],
) -> list[Tensor]:
    # An operator's results may not share memory, and the taps' gradients may.
    grads = [x.contiguous() for x in backward(inputs, taps, position, output_grads)]
    return grads[: len(inputs)] + [grad.clone() for grad in grads[len(inputs) :]]


@_shift_operator.register_fake
def _(inputs, taps, position):
    return [empty(x) for x in inputs]


@_backward_operator.register_fake
def _(inputs, taps, position, output_grads):
    return [empty(x) for x in (*inputs, *taps)]


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


def has_no_data(x: Tensor) -> bool:
    """Whether there is nothing that kernels could read: the operators' fakes answer then."""
    return (x.is_meta or isinstance(x, FakeTensor)) and implementation(x) != "eager"


def _keeps_much_else(x: Tensor, count: int) -> bool:
    """Whether more than half of the memory behind x is none of the `count` inputs."""
    return x.untyped_storage().size() > 2 * count * x.numel() * x.element_size()


def empty(x: Tensor) -> Tensor:
    """A new tensor like x, contiguous whatever x's strides."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
