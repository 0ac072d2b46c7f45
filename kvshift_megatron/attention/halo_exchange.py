"""Halo exchange: fetch the tokens before each chunk from the rank that holds them.

Megatron cuts a document into 2C chunks, and rank r of C holds chunks r and 2C-1-r, its first and
its second chunk. Chunk r-1, the first chunk of rank r-1, comes before chunk r. Chunk 2C-2-r, the
second chunk of rank r+1, comes before chunk 2C-1-r; the last rank's two chunks are neighbours. So
the last tokens of first chunks travel up one rank, and those of second chunks down one rank:

    rank      0        1        2        3          (C = 4, chunks 0..7)
    chunks   0 7      1 6      2 5      3 4
    first    0 ------> 1 -----> 2 -----> 3          nothing comes before chunk 0
    second   7 <------ 6 <----- 5 <----- 4 <- 3     rank 3: from its own first chunk

The backward pass sends the gradients along the reversed arrows.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


class HaloExchange:
    """Exchange once forward and once backward, each while other work is computed.

    Args:
        group: The context-parallel group, in the order of the layout.

    Parallelism: In either pass each rank sends each neighbour at most one message, as large as one
    chunk's last tokens; a group of one sends nothing.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank, self._size = group.rank(), group.size()
        self._pending: list[tuple[dist.Work, str]] = []
        self._buffers: list[Tensor] = []
        self._received: tuple[Tensor, ...] = ()

    def start(self, last_tokens: Tensor) -> None:
        """Start sending.

        Args:
            last_tokens: [2, ...], those of the first chunks and of the second chunks.
        """
        below, above = self._send_up_and_down(last_tokens[0], last_tokens[1])
        if self._rank == self._size - 1:
            above.copy_(last_tokens[0])
        self._received = (below, above)

    def finish(self) -> Tensor:
        """Wait for the messages of `start`.

        Returns:
            [2, ...], the tokens before the first and the second chunks; zeros before chunk 0.
        """
        return torch.stack(self._wait())

    def start_backward(self, grad: Tensor) -> None:
        """Start sending back the gradient [2, ...] of what `finish` returned."""
        # What came from rank - 1 goes back down, what came from rank + 1 back up.
        from_self = (grad[1],) if self._rank == self._size - 1 else ()
        self._received = (*self._send_up_and_down(grad[1], grad[0]), *from_self)

    def finish_backward(self) -> Tensor:
        """Wait for the messages of `start_backward`.

        Returns:
            [2, ...], the gradient of the tokens that `start` sent.
        """
        below, above, *from_self = self._wait()
        return torch.stack((above + from_self[0] if from_self else above, below))

    def _send_up_and_down(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """Start sending `up` to rank + 1 and `down` to rank - 1.

        Returns:
            Buffers for the messages from rank - 1 and from rank + 1, which `_wait` fills; zeros if
            there is no such rank.
        """
        below, above = torch.zeros_like(up), torch.zeros_like(down)
        self._buffers = [up.contiguous(), down.contiguous(), below, above]
        operations: list[dist.P2POp] = []
        peers: list[int] = []
        for step, sent, received in ((1, self._buffers[0], above), (-1, self._buffers[1], below)):
            if 0 <= self._rank + step < self._size:
                peer = dist.get_global_rank(self._group, self._rank + step)
                operations += [
                    dist.P2POp(dist.isend, sent, peer, self._group),
                    dist.P2POp(dist.irecv, received, peer, self._group),
                ]
                peers += [peer, peer]
        everyone = " and ".join(str(peer) for peer in sorted(set(peers)))
        with self._naming(everyone):
            works = dist.batch_isend_irecv(operations) if operations else []
        # NCCL returns one work for the whole batch.
        names = map(str, peers) if len(works) == len(peers) else [everyone] * len(works)
        self._pending = list(zip(works, names))
        return below, above

    def _wait(self) -> tuple[Tensor, ...]:
        pending, self._pending = self._pending, []
        for work, peer in pending:
            with self._naming(peer):
                work.wait()
        received, self._received = self._received, ()
        self._buffers = []
        return received

    @staticmethod
    @contextlib.contextmanager
    def _naming(peer: str) -> Iterator[None]:
        """Name the lost rank in a failure: the cause is in its log, not in this rank's."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"KV shifting: the context-parallel exchange of rank {dist.get_rank()} with "
                f"rank {peer} failed: {error}"
            ) from error
