"""torch's scaled_dot_product_attention in Megatron's layout."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    dropout: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """softmax(Q K^T . scale + mask) V.

    Args:
        query: [sq, b, np, hn].
        key, value: [sk, b, ng, hn], np a multiple of ng.
        scale: of the scores.
        dropout: probability, drawn from the generator in force.
        mask: bool, broadcastable to [b, np, sq, sk], True where to attend.
        is_causal: each query sees the keys up to its own index.

    Returns:
        [sq, b, np, hn].
    """
    # [s, b, n, hn] -> [b, n, s, hn]: views; SDPA takes them strided.
    context = scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.size(2) != key.size(2),
    )
    return context.permute(2, 0, 1, 3)
