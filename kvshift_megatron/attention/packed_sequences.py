"""Packed documents: where they lie, and which tokens stand before a token."""

import torch
from torch import Tensor


def physical_cu_seqlens(packed_seq_params) -> Tensor | None:
    """Where packed documents lie in memory, padding included; None where nothing is packed."""
    if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
        return None
    if packed_seq_params.cu_seqlens_kv_padded is not None:
        return packed_seq_params.cu_seqlens_kv_padded
    return packed_seq_params.cu_seqlens_kv


def document_positions(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Which document each token belongs to, and how many of its tokens stand before it.

    Args:
        cu_seqlens: int [documents + 1], from 0; empty documents are allowed.
        tokens: how many there are; those behind the last document count as one more.

    Returns:
        (document, position), each int64 [tokens]. Computed on the device: nothing is read back.
    """
    index = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].long().contiguous(), index, right=True)
    return document, index - cu_seqlens.long()[document]
