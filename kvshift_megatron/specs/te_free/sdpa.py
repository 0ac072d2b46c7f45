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
    """Return softmax(Q K^T . scale + mask) V.

    Args:
        query: [sq, b, np, hn].
        key, value: [sk, b, ng, hn]; np is a multiple of ng.
        scale: Factor of the scores.
        dropout: Probability; drawn from torch's current generator.
        mask: Bool, broadcastable to [b, np, sq, sk], True where to attend.
        is_causal: Whether each query sees only the keys up to its own index.

    Returns:
        [sq, b, np, hn], in the query's dtype.
    """
    # [s, b, n, hn] -> [b, n, s, hn] as views: SDPA takes any strides.
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
