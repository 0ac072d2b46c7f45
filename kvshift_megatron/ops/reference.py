"""The definition of the shift. Every other implementation must equal it."""

from collections.abc import Sequence

from torch import Tensor


def shift_ref(x: Tensor, taps: Tensor | Sequence[Tensor], position: Tensor | None = None) -> Tensor:
    """x^_i = sum_j taps[j] x_{i-j}, j = 0..window-1, zero before the first token.

    Source: arXiv 2411.19574, Eq. 5 (taps[0] is alpha_1, taps[1] is alpha_2, and so on).

    Args:
        x: [s, b, ng, hn] or [t, ng, hn]: tokens first, query groups second to last.
        taps: [window, ng], or a sequence of ``window`` tensors [ng]; current token first.
        position: int [s] or [t]: how many tokens of the same document stand before each token.
            None: all tokens are one document.

    Returns:
        A new tensor of x's shape and dtype. The arithmetic is in fp32, or in x's dtype where that
        is wider (float64).

    Parallelism: local. Each query group is independent; nothing crosses ranks.
    """
    return shift_wide(x, taps, position).to(x.dtype)


def shift_wide(
    x: Tensor, taps: Tensor | Sequence[Tensor], position: Tensor | None = None
) -> Tensor:
    """`shift_ref` before it is rounded to x's dtype."""
    wide = widened(x)
    out = taps[0].to(wide.dtype)[:, None] * wide
    for j in range(1, min(len(taps), len(x))):
        out[j:] += taps[j].to(wide.dtype)[:, None] * where_same_document(wide[:-j], position, j)
    return out


def widened(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic."""
    return x.double() if x.element_size() > 4 else x.float()


def where_same_document(x: Tensor, position: Tensor | None, j: int) -> Tensor:
    """x [s - j, ...], zero where token i + j of the sequence is of another document than token i.

    A choice, not a product: what lies across a boundary may be Inf or NaN.
    """
    if position is None:
        return x
    return x.where((position[j:] >= j).view(-1, *[1] * (x.dim() - 1)), 0.0)
