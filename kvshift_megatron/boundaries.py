"""Shifting a sequence that is cut: into packed documents, over context-parallel ranks, or both."""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from kvshift_megatron.cp_exchange import HistoryExchange
from kvshift_megatron.ops import kv_shift, shift_wide
from kvshift_megatron.ops.implementation import take_reference


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
        ValueError: a chunk holds fewer tokens than the window looks back, the sequence cannot be
            cut into 2C equal chunks, or kernels are forced that cannot do this.

    Parallelism: a chunk's predecessors come from the neighbouring ranks, window - 1 tokens a chunk
    (and document), keys and values in one message; see cp_exchange.py.
    """
    tokens, ranks = key.size(0), 1 if cp_group is None else cp_group.size()
    if ranks == 1:
        position = None
        if cu_seqlens is not None:
            position = document_positions(cu_seqlens, tokens)[1]
        return kv_shift(key, value, alpha, beta, position)

    take_reference("the kernels do not take the chunks of context parallelism")
    shifted = [(x, taps) for x, taps in ((key, alpha), (value, beta)) if taps is not None]
    back = len(shifted[0][1]) - 1
    if cu_seqlens is None:
        halves = _EqualHalves(tokens, back)
    else:
        halves = _DocumentHalves(cu_seqlens, tokens, ranks, back)
    exchange = HistoryExchange(cp_group)
    tails = torch.cat([halves.tails(x) for x, _ in shifted], dim=-1)
    history = exchange.start(tails)
    # The whole local part is queued while the messages are under way.
    results = [halves.shift(x, taps) for x, taps in shifted]
    history = exchange.finish(history).split([x.size(-1) for x, _ in shifted], dim=-1)
    outputs = []
    for (x, taps), result, before in zip(shifted, results, history):
        halves.add(result, _lead(before, taps))
        outputs.append(result.to(x.dtype))
    outputs = iter(outputs)
    return (
        key if alpha is None else next(outputs),
        value if beta is None else next(outputs),
    )


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


def _lead(history: Tensor, taps: Tensor) -> Tensor:
    """What `back` earlier tokens add to the `back` tokens behind them.

    Args:
        history: [..., back, b, ng, hn].
        taps: [back + 1, ng].

    Returns:
        The same shape, before rounding.
    """
    back = history.size(-4)
    before = history.movedim(-4, 0).flatten(1, -3)  # [back, ... * b, ng, hn]
    lead = shift_wide(torch.cat((before, torch.zeros_like(before))), taps)[back:]
    return lead.view(back, *history.shape[:-4], *history.shape[-3:]).movedim(0, -4)


class _EqualHalves:
    """One document: the local tokens are two chunks of equal length.

    Tails and heads are [2, back, b, ng, hn].
    """

    def __init__(self, tokens: int, back: int):
        if tokens % 2 or tokens // 2 < back:
            raise ValueError(
                f"seq_length: a context-parallel rank holds {tokens} tokens in two chunks, and "
                f"each must hold the {back} token(s) that a window of {back + 1} looks back: raise "
                "--seq-length or lower --context-parallel-size"
            )
        self._length, self._back = tokens // 2, back

    def tails(self, x: Tensor) -> Tensor:
        return x.view(2, self._length, *x.shape[1:])[:, -self._back :]

    def shift(self, x: Tensor, taps: Tensor) -> Tensor:
        return torch.cat([shift_wide(half, taps) for half in x.split(self._length)])

    def add(self, result: Tensor, lead: Tensor) -> None:
        result.view(2, self._length, *result.shape[1:])[:, : self._back] += lead


class _DocumentHalves:
    """Packed documents: each has two chunks of its own here, one behind the other.

    Tails and heads are [2, documents, back, b, ng, hn]; those of empty documents are zero.
    """

    def __init__(self, cu_seqlens: Tensor, tokens: int, ranks: int, back: int):
        cu_local = cu_seqlens.long() // ranks
        length = (cu_local[1:] - cu_local[:-1]) // 2
        whole = cu_seqlens[1:] - cu_seqlens[:-1]
        # Checked on the device, where cu_seqlens are: reading them back would stall the GPU.
        torch._assert_async(
            ((whole % (2 * ranks) == 0) & ((length >= back) | (length == 0))).all(),
            f"cu_seqlens: with context parallelism over {ranks} ranks every packed document must "
            f"be padded to a multiple of {2 * ranks} tokens, and each chunk hold the {back} "
            f"token(s) that a window of {back + 1} looks back",
        )
        document, position = document_positions(cu_local, tokens)
        # What lies behind the last document belongs to nobody; one chunk will do for it.
        half = torch.cat((length, length.new_full((1,), tokens)))[document]
        self._position = torch.where(position >= half, position - half, position)
        start = torch.stack((cu_local[:-1], cu_local[:-1] + length))  # [2, documents]
        offset = torch.arange(back, device=start.device)
        self._is_real = (length > 0).view(1, -1, 1, 1, 1, 1)
        self._heads = (start[..., None] + offset).clamp(max=tokens - 1)
        self._tails = (start[..., None] + length[:, None] - back + offset).clamp(0, tokens - 1)

    def tails(self, x: Tensor) -> Tensor:
        picked = x.index_select(0, self._tails.flatten()).view(*self._tails.shape, *x.shape[1:])
        return picked.where(self._is_real, 0.0)

    def shift(self, x: Tensor, taps: Tensor) -> Tensor:
        return shift_wide(x, taps, self._position)

    def add(self, result: Tensor, lead: Tensor) -> None:
        result.index_add_(0, self._heads.flatten(), lead.where(self._is_real, 0.0).flatten(0, 2))
