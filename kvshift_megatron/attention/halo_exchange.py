"""The tokens before each chunk, from the rank that holds them: Megatron's load-balanced layout.

A document is cut into 2C chunks and rank r of C holds chunks r and 2C-1-r, here called its first
and second half. Before chunk r comes chunk r-1, the first half of rank r-1; before chunk 2C-1-r
comes chunk 2C-2-r, the second half of rank r+1, except on the last rank, where the two halves are
neighbours. So first-half tails travel up one rank and second-half tails down one:

    rank      0        1        2        3          (C = 4, chunks 0..7)
    halves   0 7      1 6      2 5      3 4
    first    0 ------> 1 -----> 2 -----> 3          nothing comes before chunk 0
    second   7 <------ 6 <----- 5 <----- 4 <- 3     rank 3: from its own first half

The backward sends the gradients the same ways back.
"""

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor


class HistoryExchange:
    """One exchange, forward and backward: each is started early and waited for late.

    Args:
        group: the context-parallel group, in the order of the layout.

    Parallelism: each rank sends at most one message to each neighbour in either pass, of as many
    bytes as one half's tails; nothing is sent on a group of one.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self._rank, self._size = group.rank(), group.size()
        self._pending: list[tuple[dist.Work, int | str]] = []
        self._buffers: list[Tensor] = []
        self._received: tuple[Tensor, ...] = ()

    def start(self, tails: Tensor) -> None:
        """Begin to send.

        Args:
            tails: [2, ...]: the last tokens of the first and of the second halves.
        """
        below, above = self._send_up_and_down(tails[0], tails[1])
        if self._rank == self._size - 1:
            above.copy_(tails[0])
        self._received = (below, above)

    def finish(self) -> Tensor:
        """Wait for what `start` began.

        Returns:
            [2, ...]: the tokens before the first and the second halves; zeros before chunk 0.
        """
        return torch.stack(self._wait())

    def start_backward(self, grad: Tensor) -> None:
        """Begin to send the gradient of what `finish` returned: the same ways back."""
        # What came from rank - 1 goes back down, what came from rank + 1 back up.
        from_self = (grad[1],) if self._rank == self._size - 1 else ()
        self._received = (*self._send_up_and_down(grad[1], grad[0]), *from_self)

    def finish_backward(self) -> Tensor:
        """Wait for what `start_backward` began.

        Returns:
            [2, ...]: the gradient of the tails that `start` sent.
        """
        below, above, *from_self = self._wait()
        return torch.stack((above + from_self[0] if from_self else above, below))

    def _send_up_and_down(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """Start sending `up` to rank + 1 and `down` to rank - 1.

        Returns:
            (what comes from rank - 1, what comes from rank + 1), zeros at the ends; filled after
            `_wait`.
        """
        below, above = torch.zeros_like(up), torch.zeros_like(down)
        self._buffers = [up.contiguous(), down.contiguous(), below, above]
        operations, peers = [], []
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
        if len(works) != len(peers):  # NCCL answers with one work for the whole batch
            peers = [everyone] * len(works)
        self._pending = list(zip(works, peers))
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
    def _naming(peer: int | str):
        """A failure names the rank that was lost: its log has the cause, not this one's."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"KV shifting: the context-parallel exchange of rank {dist.get_rank()} with "
                f"rank {peer} failed: {error}"
            ) from error
