"""The definition of the shift, alone and with rotated keys. Every implementation must equal it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def shift_ref(x: Tensor, taps: Tensor | Sequence[Tensor], position: Tensor | None = None) -> Tensor:
    """x^_i = sum_j taps[j] x_{i-j}, j = 0..window-1, zero before the first token.

    Source: arXiv 2411.19574, Eq. 5 (taps[0] is alpha_1, taps[1] is alpha_2, and so on).

    Args:
        x: [s, b, ng, hn] or [t, ng, hn]: tokens first, query groups second to last.
        taps: [window, ng], or a sequence of ``window`` tensors [ng]; current token first.
        position: int [s] or [t]: the number of earlier tokens in each token's document.
            None: the sequence is one document.

    Returns:
        A new tensor of x's shape and dtype, computed in fp32, or in float64 for float64 inputs.

    Parallelism: local. Query groups are independent; nothing crosses ranks.
    """
    return shift_wide(x, taps, position).to(x.dtype)


def shift_wide(
    x: Tensor, taps: Tensor | Sequence[Tensor], position: Tensor | None = None
) -> Tensor:
    """Return `shift_ref` before it is rounded to x's dtype."""
    wide = widened(x)
    out = taps[0].to(wide.dtype)[:, None] * wide
    for j in range(1, min(len(taps), len(x))):
        out[j:] += taps[j].to(wide.dtype)[:, None] * mask_other_documents(wide[:-j], position, j)
    return out


def rope_shift_ref(
    key: Tensor,
    value: Tensor,
    alpha: Tensor | Sequence[Tensor] | None,
    beta: Tensor | Sequence[Tensor] | None,
    freqs: Tensor,
    position: Tensor | None = None,
    *,
    freq_index: Tensor | None = None,
    interleaved: bool = False,
    mscale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Shift keys and values, then rotate the keys; round once.

    Arguments and results are those of `kv_shift_rope`.
    """
    shifted = widened(key) if alpha is None else shift_wide(key, alpha, position)
    rotated = rotate(shifted, freqs, freq_index, interleaved, mscale).to(key.dtype)
    if beta is not None:
        value = shift_wide(value, beta, position).to(value.dtype)
    return rotated, value


def rotate(
    x: Tensor, freqs: Tensor, freq_index: Tensor | None, interleaved: bool, mscale: float
) -> Tensor:
    """Return mscale (x_c cos(f_c) + x'_c sin(f_c)), x' being x rotated by a quarter turn.

    Args:
        x: [s, b, ng, hn] or [t, ng, hn], fp32 or float64.
        freqs: [positions, ..., rotary]: one angle per channel; later channels stay as they are.
        freq_index: int [s] or [t]: each token's row of freqs. None: row i for token i.
        interleaved: pairs are channels 2c and 2c + 1, not c and c + rotary / 2.
        mscale: factor of the rotated channels.
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
    rotated = x * (freqs.cos() * mscale) + quarter * (freqs.sin() * mscale)
    return torch.cat((rotated, rest), dim=-1)


def widened(x: Tensor) -> Tensor:
    """Return x in the dtype of the arithmetic: float64 for float64, else fp32."""
    return x.double() if x.element_size() > 4 else x.float()


def mask_other_documents(x: Tensor, position: Tensor | None, j: int) -> Tensor:
    """Zero rows i of x [s - j, ...] if tokens i and i + j belong to different documents.

    A selection, not a product: what lies across a boundary may be Inf or NaN.
    """
    if position is None:
        return x
    return x.where((position[j:] >= j).view(-1, *[1] * (x.dim() - 1)), 0.0)
