"""The definition of the shift. Every other implementation must equal it."""

from collections.abc import Sequence

from torch import Tensor


def shift_ref(x: Tensor, taps: Tensor | Sequence[Tensor]) -> Tensor:
    """x^_i = sum_j taps[j] x_{i-j}, j = 0..window-1, zero before the first token.

    Source: arXiv 2411.19574, Eq. 5 (taps[0] is alpha_1, taps[1] is alpha_2, and so on).

    Args:
        x: [s, b, ng, hn] or [t, ng, hn]: tokens first, query groups second to last.
        taps: [window, ng], or a sequence of ``window`` tensors [ng]; current token first.

    Returns:
        A new tensor of x's shape and dtype. The arithmetic is in fp32, or in x's dtype where that
        is wider (float64).

    Parallelism: local. Each query group is independent; nothing crosses ranks.
    """
    wide = x.double() if x.element_size() > 4 else x.float()
    out = taps[0].to(wide.dtype)[:, None] * wide
    for j in range(1, min(len(taps), len(x))):
        out[j:] += taps[j].to(wide.dtype)[:, None] * wide[:-j]
    return out.to(x.dtype)
