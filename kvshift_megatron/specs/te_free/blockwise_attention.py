"""Exact causal attention over packed documents and context-parallel chunks, in linear memory."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kvshift_megatron.attention.packed_sequences import document_positions
from kvshift_megatron.specs.te_free.sdpa import sdpa

# Queries per block. One block's mask has this many times the number of keys as elements.
_BLOCK = 512


@dataclass
class Places:
    """Each token's document and its position in that, both int64 [tokens]."""

    document: Tensor
    position: Tensor

    def __getitem__(self, index: slice | Tensor) -> "Places":
        return Places(self.document[index], self.position[index])


def places_on_rank(
    cu_seqlens: Tensor | None, tokens: int, rank: int, ranks: int, device: torch.device
) -> Places:
    """Return the places of a context-parallel rank's tokens, which are zigzag chunks.

    Args:
        cu_seqlens: int [documents + 1], bounds in the whole sequence, padding included; None: one
            document.
        tokens: Number of the rank's tokens.
        rank, ranks: The rank in the context-parallel group, and the group's size.
        device: For the places of one document.
    """
    if cu_seqlens is None:
        cu_seqlens = torch.arange(2, device=device) * (tokens * ranks)
    cu_local = cu_seqlens.long() // ranks
    document, position = document_positions(cu_local, tokens)
    if ranks == 1:
        return Places(document, position)
    # Padding after the last document counts as one more document, all of it in a first chunk.
    chunk = torch.cat(((cu_local[1:] - cu_local[:-1]) // 2, cu_local.new_full((1,), tokens)))
    chunk = chunk[document]
    first, second = rank * chunk + position, (2 * ranks - 2 - rank) * chunk + position
    return Places(document, torch.where(position < chunk, first, second))


def gather_keys(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate every rank's [t, b, ng, hn] along t; the backward pass sums over the ranks."""
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
    """Return softmax(Q K^T . scale) V, each query over its document's keys up to itself.

    Args:
        query: [tq, b, np, hn].
        key, value: [tk, b, ng, hn], in any order of tokens; np is a multiple of ng.
        query_places, key_places: Those of the tq and tk tokens.
        scale: Factor of the scores.
        dropout: Probability; drawn from torch's current generator.
        window: How many tokens back a query sees; None or -1: all.

    Returns:
        [tq, b, np, hn], in the query's dtype. The backward pass recomputes the masks.
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
