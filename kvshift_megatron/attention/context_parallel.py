"""Shift sequences that are packed documents, split over context-parallel ranks, or both."""

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from kvshift_megatron.attention.cp_chunks import Chunks, PackedZigzagChunks, ZigzagChunks
from kvshift_megatron.attention.halo_exchange import HaloExchange
from kvshift_megatron.attention.packed_sequences import document_positions
from kvshift_megatron.ops import eager, kv_shift, shift_ref
from kvshift_megatron.ops.autograd import SHIFT, ShiftOperator


def context_parallel_group(
    config: TransformerConfig, pg_collection: ProcessGroupCollection
) -> dist.ProcessGroup | None:
    """Return the group that splits this model's sequences, or None if they are whole.

    The configuration decides, as in Megatron's attention kernels: one model of a run may go without
    context parallelism although the run has a group for another.
    """
    return pg_collection.cp if config.context_parallel_size > 1 else None


def shift_across_boundaries(
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    cu_seqlens: Tensor | None,
    cp_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Apply `kv_shift` where the previous token may be another document's or on another rank.

    Args:
        key, value: [s, b, ng, hn], this rank's tokens; b is 1 for packed documents.
        alpha, beta: [window, ng], or None.
        cu_seqlens: int [documents + 1], bounds of the packed documents in the WHOLE sequence,
            padding included; each document is split over the ranks separately. None: One document.
        cp_group: The context-parallel group; None without context parallelism.

    Returns:
        (key, value), as `kv_shift`.

    Raises:
        ValueError: A chunk holds fewer tokens than the window looks back, or the sequence cannot be
            cut into 2C equal chunks.

    Parallelism: The tokens before a chunk come from the neighbouring ranks, window - 1 per chunk
    (and document), keys and values in one message; see halo_exchange.py.
    """
    tokens = key.size(0)
    if cp_group is None or cp_group.size() == 1:
        position = None
        if cu_seqlens is not None:
            position = document_positions(cu_seqlens, tokens)[1]
        return kv_shift(key, value, alpha, beta, position)

    shifted = [(x, taps) for x, taps in ((key, alpha), (value, beta)) if taps is not None]
    inputs, taps = zip(*shifted)
    back = len(taps[0]) - 1
    chunks: Chunks
    if cu_seqlens is None:
        chunks = ZigzagChunks(tokens, back, key.device)
    else:
        chunks = PackedZigzagChunks(cu_seqlens, tokens, cp_group.size(), back)
    kernels, kept = SHIFT.prepare(inputs, back + 1)
    exchange = HaloExchange(cp_group)
    outputs = iter(ContextParallelShift.apply(kernels, chunks, exchange, *kept, *taps))
    return (
        key if alpha is None else next(outputs),
        value if beta is None else next(outputs),
    )


class ContextParallelShift(torch.autograd.Function):
    """Shift locally with chunks as documents, then recompute the chunks' first tokens.

    Keys and values, concatenated as groups, share one exchange and one recomputation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: ModuleType | ShiftOperator,
        chunks: Chunks,
        exchange: HaloExchange,
        *inputs_and_taps: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(inputs_and_taps) // 2
        inputs, taps = inputs_and_taps[:count], inputs_and_taps[count:]
        exchange.start(_side_by_side(chunks.last_tokens(x) for x in inputs))
        # Queue the whole local part while the messages travel.
        with torch.profiler.record_function("kv_shift: local part"):
            outputs = kernels.forward(inputs, taps, chunks.position)
        with torch.profiler.record_function("kv_shift: wait for the halo"):
            halo = exchange.finish()
        first = _side_by_side(chunks.first_tokens(x) for x in inputs)
        new = shift_ref(_joined(halo, first), torch.cat(taps, dim=-1))
        new = new[len(new) // 2 :].movedim(0, -4)
        for output, its_first in zip(outputs, new.chunk(count, dim=-2)):
            chunks.set_first_tokens(output, its_first)
        ctx.save_for_backward(halo, *inputs_and_taps)
        ctx.kernels, ctx.chunks, ctx.exchange = kernels, chunks, exchange
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        chunks, exchange = ctx.chunks, ctx.exchange
        halo, *inputs_and_taps = ctx.saved_tensors
        count = len(output_grads)
        inputs, taps = inputs_and_taps[:count], inputs_and_taps[count:]
        # Gradients of the halo, and the halo's part of the taps' gradients; the rest is local.
        first = _side_by_side(chunks.first_tokens(grad) for grad in output_grads)
        grad, tap_grads = eager.backward(
            [_joined(halo, torch.zeros_like(halo))],
            [torch.cat(taps, dim=-1)],
            None,
            [_joined(torch.zeros_like(first), first)],
        )
        exchange.start_backward(grad[: len(grad) // 2].movedim(0, -4))
        with torch.profiler.record_function("kv_shift: local part"):
            grads = ctx.kernels.backward(inputs, taps, chunks.position, output_grads)
        with torch.profiler.record_function("kv_shift: wait for the halo's gradient"):
            last = exchange.finish_backward()
        for input_grad, its_last in zip(grads, last.chunk(count, dim=-2)):
            chunks.add_to_last_tokens(input_grad, its_last)
        own_tap_grads = zip(grads[count:], tap_grads.chunk(count, dim=-1))
        return None, None, None, *grads[:count], *(one + other for one, other in own_tap_grads)


def _side_by_side(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(tensors), dim=-2)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Join two [..., back, b, ng, hn] along tokens, as [2 back, ..., b, ng, hn]."""
    return torch.cat((first, second), dim=-4).movedim(-4, 0)
