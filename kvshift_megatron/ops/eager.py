"""The shift in plain PyTorch, for any device and floating dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvshift_megatron.ops.reference import mask_other_documents, shift_ref, widened


def forward(
    inputs: Sequence[Tensor], taps: Sequence[Tensor], position: Tensor | None
) -> list[Tensor]:
    """Return `shift_ref` of each input."""
    return [shift_ref(x, tap, position) for x, tap in zip(inputs, taps)]


def backward(
    inputs: Sequence[Tensor],
    taps: Sequence[Tensor],
    position: Tensor | None,
    output_grads: Sequence[Tensor],
) -> list[Tensor]:
    """Return the gradients of the inputs, then those of the taps."""
    input_grads, tap_grads = zip(
        *(_backward(*tensors, position) for tensors in zip(inputs, taps, output_grads))
    )
    return [*input_grads, *tap_grads]


def _backward(
    x: Tensor, taps: Tensor, dy: Tensor, position: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dx_i = sum_j taps[j] dy_{i+j}; dtaps[j] = sum_i dy_{i+j} x_i."""
    wide, grad = widened(x), widened(dy)
    dx = taps[0].to(grad.dtype)[:, None] * grad
    dtaps = torch.zeros_like(taps)
    dtaps[0] = _total(grad * wide)
    for j in range(1, min(len(taps), len(x))):
        later = mask_other_documents(grad[j:], position, j)
        dx[:-j] += taps[j].to(grad.dtype)[:, None] * later
        dtaps[j] = _total(later * wide[:-j])
    return dx.to(x.dtype), dtaps


def _total(products: Tensor) -> Tensor:
    """Sum [..., ng, hn] to [ng]: over tokens in float64, as the terms may cancel."""
    return products.sum(-1).flatten(0, -2).sum(0, dtype=torch.float64)
