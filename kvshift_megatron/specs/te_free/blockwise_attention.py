"""Exact causal attention over packed documents and context-parallel chunks, in linear memory."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kvshift_megatron.attention.packed_sequences import document_positions
from kvshift_megatron.specs.te_free.sdpa import sdpa

# Queries a mask covers at a time: memory for masks is this times the number of keys.
_BLOCK = 512


@dataclass
class Places:
    """Where tokens stand: int64 [tokens] each."""

    document: Tensor
    position: Tensor

    def __getitem__(self, index: slice | Tensor) -> "Places":
        return Places(self.document[index], self.position[index])


def places_on_rank(
    cu_seqlens: Tensor | None, tokens: int, rank: int, ranks: int, device: torch.device
) -> Places:
    """Places of a context-parallel rank's tokens, in Megatron's load-balanced layout.

    Args:
        cu_seqlens: int [documents + 1] of the whole sequence, padding included; None: one document.
        tokens: of this rank.
        rank, ranks: of the context-parallel group.
    """
    if cu_seqlens is None:
        cu_seqlens = torch.arange(2, device=device) * (tokens * ranks)
    cu_local = cu_seqlens.long() // ranks
    document, position = document_positions(cu_local, tokens)
    if ranks == 1:
        return Places(document, position)
    # What lies behind the last document is one more, whose tokens are all in a first half.
    half = torch.cat(((cu_local[1:] - cu_local[:-1]) // 2, cu_local.new_full((1,), tokens)))
    half = half[document]
    first, second = rank * half + position, (2 * ranks - 2 - rank) * half + position
    return Places(document, torch.where(position < half, first, second))


def gather_keys(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t, b, ng, hn] of every rank, one behind the other; the backward sums over the ranks."""
    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)


def blockwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_places: Places,
    key_places: Places,
    *,
    scale: float,
    dropout: float,
    window: int | None = None,
) -> Tensor:
    """softmax(Q K^T . scale) V, each query over the keys of its document up to itself.

    Args:
        query: [tq, b, np, hn].
        key, value: [tk, b, ng, hn], np a multiple of ng, in any order.
        query_places, key_places: of tq and tk tokens.
        scale: of the scores.
        dropout: probability, drawn from the generator in force.
        window: how many tokens back a query sees; None or -1: all.

    Returns:
        [tq, b, np, hn]. Masks are rebuilt in the backward pass and not kept.
    """

    def attend(block: Tensor, places: Places, key: Tensor, value: Tensor) -> Tensor:
        distance = places.position[:, None] - key_places.position
        mask = (places.document[:, None] == key_places.document) & (distance >= 0)
        if window is not None and window >= 0:
            mask &= distance <= window
        return sdpa(block, key, value, scale=scale, dropout=dropout, mask=mask)

    outputs = []
    for start in range(0, query.size(0), _BLOCK):
        rows = slice(start, start + _BLOCK)
        arguments = (query[rows], query_places[rows], key, value)
        if torch.is_grad_enabled():
            outputs.append(
                checkpoint(
                    attend, *arguments, use_reentrant=False, preserve_rng_state=dropout > 0.0
                )
            )
        else:
            outputs.append(attend(*arguments))
    return torch.cat(outputs)
