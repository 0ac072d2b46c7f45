"""Shifting a sequence that is cut: into packed documents, over context-parallel ranks, or both."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from kvshift_megatron.attention.cp_chunks import DocumentHalves, EqualHalves
from kvshift_megatron.attention.halo_exchange import HistoryExchange
from kvshift_megatron.attention.packed_sequences import document_positions
from kvshift_megatron.ops import eager, kv_shift, shift_ref
from kvshift_megatron.ops.autograd import SHIFT


def context_parallel_group(
    config: TransformerConfig, pg_collection: ProcessGroupCollection
) -> dist.ProcessGroup | None:
    """The group that this model's sequences are spread over; None where they are whole.

    As Megatron's attention kernels decide it: a model may switch context parallelism off in its
    configuration although a group exists, for another model of the same run.
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
    """`kv_shift` where the token before may be another document's, or on another rank.

    Args:
        key, value: [s, b, ng, hn]: this rank's tokens; for packed documents b is 1.
        alpha, beta: [window, ng], or None.
        cu_seqlens: int [documents + 1]: where each packed document starts and ends in the WHOLE
            sequence, padding included; each document is spread over the ranks by itself. None: one
            document, spread over the ranks.
        cp_group: context-parallel group; None without context parallelism.

    Returns:
        (key, value) as kv_shift's.

    Raises:
        ValueError: a chunk holds fewer tokens than the window looks back, or the sequence cannot be
            cut into 2C equal chunks.

    Parallelism: a chunk's predecessors come from the neighbouring ranks, window - 1 tokens a chunk
    (and document), keys and values in one message; see halo_exchange.py.
    """
    tokens, ranks = key.size(0), 1 if cp_group is None else cp_group.size()
    if ranks == 1:
        position = None
        if cu_seqlens is not None:
            position = document_positions(cu_seqlens, tokens)[1]
        return kv_shift(key, value, alpha, beta, position)

    shifted = [(x, taps) for x, taps in ((key, alpha), (value, beta)) if taps is not None]
    inputs, taps = zip(*shifted)
    back = len(taps[0]) - 1
    if cu_seqlens is None:
        halves = EqualHalves(tokens, back, key.device)
    else:
        halves = DocumentHalves(cu_seqlens, tokens, ranks, back)
    kernels, inputs = SHIFT.prepare(inputs)
    outputs = iter(_OverRanks.apply(kernels, halves, HistoryExchange(cp_group), *inputs, *taps))
    return (
        key if alpha is None else next(outputs),
        value if beta is None else next(outputs),
    )


class _OverRanks(torch.autograd.Function):
    """The local part as on one rank, with chunks for documents; then the chunks' heads once more.

    Keys and values are one exchange and, at the heads, one computation: side by side as groups.
    """

    @staticmethod
    def forward(ctx, kernels, halves, exchange, *inputs_and_taps):
        count = len(inputs_and_taps) // 2
        inputs, taps = inputs_and_taps[:count], inputs_and_taps[count:]
        exchange.start(_side_by_side(halves.tails(x) for x in inputs))
        # The whole local part is queued while the messages are under way.
        with torch.profiler.record_function("kv_shift: local part"):
            outputs = kernels.forward(inputs, taps, halves.position)
        with torch.profiler.record_function("kv_shift: wait for the history"):
            history = exchange.finish()
        heads = _side_by_side(halves.heads(x) for x in inputs)
        new = shift_ref(_behind(history, heads), torch.cat(taps, dim=-1))
        new = new[len(new) // 2 :].movedim(0, -4)
        for output, its_heads in zip(outputs, new.chunk(count, dim=-2)):
            halves.set_heads(output, its_heads)
        ctx.save_for_backward(history, *inputs_and_taps)
        ctx.kernels, ctx.halves, ctx.exchange = kernels, halves, exchange
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *output_grads):
        halves, exchange = ctx.halves, ctx.exchange
        history, *inputs_and_taps = ctx.saved_tensors
        count = len(output_grads)
        inputs, taps = inputs_and_taps[:count], inputs_and_taps[count:]
        # What the heads owe to the history alone; the local part has the rest.
        heads = _side_by_side(halves.heads(grad) for grad in output_grads)
        grad, tap_grads = eager.backward(
            [_behind(history, torch.zeros_like(history))],
            [torch.cat(taps, dim=-1)],
            None,
            [_behind(torch.zeros_like(heads), heads)],
        )
        exchange.start_backward(grad[: len(grad) // 2].movedim(0, -4))
        with torch.profiler.record_function("kv_shift: local part"):
            grads = ctx.kernels.backward(inputs, taps, halves.position, output_grads)
        with torch.profiler.record_function("kv_shift: wait for the tails' gradient"):
            tails = exchange.finish_backward()
        for input_grad, its_tails in zip(grads, tails.chunk(count, dim=-2)):
            halves.add_to_tails(input_grad, its_tails)
        own_tap_grads = zip(grads[count:], tap_grads.chunk(count, dim=-1))
        return None, None, None, *grads[:count], *(one + other for one, other in own_tap_grads)


def _side_by_side(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(tensors), dim=-2)


def _behind(first: Tensor, second: Tensor) -> Tensor:
    """[2 back, ..., b, ng, hn] of two [..., back, b, ng, hn]: tokens first."""
    return torch.cat((first, second), dim=-4).movedim(-4, 0)
