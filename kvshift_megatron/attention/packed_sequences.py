"""Packed documents: their bounds in memory, and how many tokens come before each token."""

from typing import Any

import torch
from torch import Tensor


def physical_cu_seqlens(packed_seq_params: Any) -> Tensor | None:
    """Return packed documents' bounds in memory (with padding), int [documents + 1], or None."""
    if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
        return None
    if packed_seq_params.cu_seqlens_kv_padded is not None:
        return packed_seq_params.cu_seqlens_kv_padded
    return packed_seq_params.cu_seqlens_kv


def document_positions(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Find the document of each token, and how many of its tokens come before it.

    Args:
        cu_seqlens: int [documents + 1], from 0; documents may be empty.
        tokens: Number of tokens; those after the last document count as one more document.

    Returns:
        (document, position), each int64 [tokens], computed without reading back from the device.
    """
    index = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].long().contiguous(), index, right=True)
    return document, index - cu_seqlens.long()[document]
