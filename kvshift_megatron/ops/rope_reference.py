"""The definition of the shift with rotated keys. The kernels must equal it."""

import torch
from torch import Tensor

from kvshift_megatron.ops.reference import shift_wide, widened


def rope_shift_ref(
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    freqs: Tensor,
    position: Tensor | None = None,
    *,
    freq_index: Tensor | None = None,
    interleaved: bool = False,
    mscale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`shift_ref` of keys and values, then the rotation of the keys; rounded once.

    Arguments and results as `kv_shift_rope`'s.
    """
    shifted = widened(key) if alpha is None else shift_wide(key, alpha, position)
    turned = rotate(shifted, freqs, freq_index, interleaved, mscale).to(key.dtype)
    if beta is not None:
        value = shift_wide(value, beta, position).to(value.dtype)
    return turned, value


def rotate(
    x: Tensor, freqs: Tensor, freq_index: Tensor | None, interleaved: bool, mscale: float
) -> Tensor:
    """x_c cos(f_c) + x'_c sin(f_c) for the first channels, x' being x turned by a quarter.

    Args:
        x: [s, b, ng, hn] or [t, ng, hn], fp32 or float64.
        freqs: [positions, ..., rotary]: an angle for each channel; those behind stay as they are.
        freq_index: int [s] or [t]: the row of freqs for each token; None: its own.
        interleaved: channels 2c and 2c + 1 turn together, not c and c + rotary / 2.
    """
    freqs = freqs.flatten(0, -2)
    freqs = freqs[: len(x)] if freq_index is None else freqs[freq_index]
    freqs = freqs.to(x.dtype).view(len(x), *[1] * (x.dim() - 2), freqs.size(-1))
    x, rest = x[..., : freqs.size(-1)], x[..., freqs.size(-1) :]
    if interleaved:
        quarter = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        quarter = torch.cat((-second, first), dim=-1)
    turned = x * (freqs.cos() * mscale) + quarter * (freqs.sin() * mscale)
    return torch.cat((turned, rest), dim=-1)
