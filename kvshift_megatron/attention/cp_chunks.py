"""Locate a rank's zigzag chunks, and the tokens of these that are exchanged.

Under context parallelism Megatron cuts a sequence into 2C zigzag chunks and gives each of C ranks
two of them. The first `back` tokens of a chunk look back into the chunk before it, which is on
another rank: they need that chunk's last `back` tokens.
"""

import torch
from torch import Tensor

from kvshift_megatron.attention.packed_sequences import document_positions


class ZigzagChunks:
    """One document: the local tokens are two chunks of equal length.

    First and last tokens are [2, back, b, ng, hn].

    Args:
        tokens: Number of local tokens.
        back: window - 1.
        device: Of the positions.

    Attributes:
        position: int64 [tokens], how many tokens of the same chunk come before each token.

    Raises:
        ValueError: The tokens cannot be cut into two chunks of at least `back` tokens.
    """

    def __init__(self, tokens: int, back: int, device: torch.device) -> None:
        if tokens % 2 or tokens // 2 < back:
            raise ValueError(
                f"seq_length: a context-parallel rank holds {tokens} tokens in two chunks, and "
                f"each must hold the {back} token(s) that a window of {back + 1} looks back: raise "
                "--seq-length or lower --context-parallel-size"
            )
        self._length, self._back = tokens // 2, back
        self.position = torch.arange(self._length, device=device).repeat(2)

    def last_tokens(self, x: Tensor) -> Tensor:
        return self._chunks(x)[:, -self._back :]

    def first_tokens(self, x: Tensor) -> Tensor:
        return self._chunks(x)[:, : self._back]

    def set_first_tokens(self, x: Tensor, first: Tensor) -> None:
        self.first_tokens(x).copy_(first)

    def add_to_last_tokens(self, x: Tensor, last: Tensor) -> None:
        self.last_tokens(x).add_(last)

    def _chunks(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (2, self._length))


class PackedZigzagChunks:
    """Packed documents: each has two chunks here, stored one after the other.

    First and last tokens are [2, documents, back, b, ng, hn]; those of empty documents are zero.

    Args:
        cu_seqlens: int [documents + 1], bounds of the documents in the whole sequence.
        tokens: Number of local tokens.
        ranks: Size of the context-parallel group.
        back: window - 1.

    Attributes:
        position: int64 [tokens], how many tokens of the same chunk come before each token.
    """

    def __init__(self, cu_seqlens: Tensor, tokens: int, ranks: int, back: int) -> None:
        cu_local = cu_seqlens.long() // ranks
        length = (cu_local[1:] - cu_local[:-1]) // 2
        whole = cu_seqlens[1:] - cu_seqlens[:-1]
        # Checked on the device that holds cu_seqlens: reading them back would stall the GPU.
        torch._assert_async(
            ((whole % (2 * ranks) == 0) & ((length >= back) | (length == 0))).all(),
            f"cu_seqlens: with context parallelism over {ranks} ranks every packed document must "
            f"be padded to a multiple of {2 * ranks} tokens, and each chunk hold the {back} "
            f"token(s) that a window of {back + 1} looks back",
        )
        document, position = document_positions(cu_local, tokens)
        # Padding after the last document belongs to none; treat it as one chunk.
        chunk_length = torch.cat((length, length.new_full((1,), tokens)))[document]
        is_second = position >= chunk_length
        self.position = torch.where(is_second, position - chunk_length, position)
        start = torch.stack((cu_local[:-1], cu_local[:-1] + length))  # [2, documents]
        offset = torch.arange(back, device=start.device)
        self._is_real = (length > 0).view(1, -1, 1, 1, 1, 1)
        self._first = (start[..., None] + offset).clamp(max=tokens - 1)
        self._last = (start[..., None] + length[:, None] - back + offset).clamp(0, tokens - 1)
        # An empty document's rows point into another document: map each row to its real owner.
        rows, documents = self._first.flatten(), len(length)
        self._is_first = (self.position[rows] < back) & (document[rows] < documents)
        owner = (is_second[rows] * documents + document[rows]) * back + self.position[rows]
        self._owner = owner.where(self._is_first, 0)

    def last_tokens(self, x: Tensor) -> Tensor:
        return self._pick(x, self._last)

    def first_tokens(self, x: Tensor) -> Tensor:
        return self._pick(x, self._first)

    def set_first_tokens(self, x: Tensor, first: Tensor) -> None:
        rows = self._first.flatten()
        new = first.flatten(0, 2)[self._owner]
        x.index_copy_(0, rows, new.where(self._is_first.view(-1, 1, 1, 1), x[rows]))

    def add_to_last_tokens(self, x: Tensor, last: Tensor) -> None:
        x.index_add_(0, self._last.flatten(), last.where(self._is_real, 0.0).flatten(0, 2))

    def _pick(self, x: Tensor, rows: Tensor) -> Tensor:
        picked = x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:])
        return picked.where(self._is_real, 0.0)


Chunks = ZigzagChunks | PackedZigzagChunks
