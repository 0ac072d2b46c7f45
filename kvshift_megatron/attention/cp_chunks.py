"""Where the chunks of context parallelism lie on a rank, and what their first tokens need.

A chunk's first `back` tokens, its head, look back into the chunk before it, which is on another
rank: they need that chunk's tail, its last `back` tokens.
"""

import torch
from torch import Tensor

from kvshift_megatron.attention.packed_sequences import document_positions


class EqualHalves:
    """One document: the local tokens are two chunks of equal length.

    Attributes:
        position: int64 [tokens]: tokens of the same chunk before each.

    Tails and heads are [2, back, b, ng, hn].
    """

    def __init__(self, tokens: int, back: int, device: torch.device):
        if tokens % 2 or tokens // 2 < back:
            raise ValueError(
                f"seq_length: a context-parallel rank holds {tokens} tokens in two chunks, and "
                f"each must hold the {back} token(s) that a window of {back + 1} looks back: raise "
                "--seq-length or lower --context-parallel-size"
            )
        self._length, self._back = tokens // 2, back
        self.position = torch.arange(self._length, device=device).repeat(2)

    def tails(self, x: Tensor) -> Tensor:
        return self._halves(x)[:, -self._back :]

    def heads(self, x: Tensor) -> Tensor:
        return self._halves(x)[:, : self._back]

    def set_heads(self, x: Tensor, heads: Tensor) -> None:
        self.heads(x).copy_(heads)

    def add_to_tails(self, x: Tensor, tails: Tensor) -> None:
        self.tails(x).add_(tails)

    def _halves(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (2, self._length))


class DocumentHalves:
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
        is_second = position >= half
        self.position = torch.where(is_second, position - half, position)
        start = torch.stack((cu_local[:-1], cu_local[:-1] + length))  # [2, documents]
        offset = torch.arange(back, device=start.device)
        self._is_real = (length > 0).view(1, -1, 1, 1, 1, 1)
        self._heads = (start[..., None] + offset).clamp(max=tokens - 1)
        self._tails = (start[..., None] + length[:, None] - back + offset).clamp(0, tokens - 1)
        # An empty document's head names tokens of another one: whose head, if anybody's?
        rows, documents = self._heads.flatten(), len(length)
        self._is_head = (self.position[rows] < back) & (document[rows] < documents)
        owner = (is_second[rows] * documents + document[rows]) * back + self.position[rows]
        self._owner = owner.where(self._is_head, 0)

    def tails(self, x: Tensor) -> Tensor:
        return self._pick(x, self._tails)

    def heads(self, x: Tensor) -> Tensor:
        return self._pick(x, self._heads)

    def set_heads(self, x: Tensor, heads: Tensor) -> None:
        rows = self._heads.flatten()
        new = heads.flatten(0, 2)[self._owner]
        x.index_copy_(0, rows, new.where(self._is_head.view(-1, 1, 1, 1), x[rows]))

    def add_to_tails(self, x: Tensor, tails: Tensor) -> None:
        x.index_add_(0, self._tails.flatten(), tails.where(self._is_real, 0.0).flatten(0, 2))

    def _pick(self, x: Tensor, rows: Tensor) -> Tensor:
        picked = x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:])
        return picked.where(self._is_real, 0.0)
