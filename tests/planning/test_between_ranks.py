"""The profiler is closed when the operations that were begun under it are complete."""

import pytest
import torch
import torch.distributed as dist

from tests.planning import between_ranks
from tests.planning.between_ranks import BetweenRanks


@pytest.mark.usefixtures("megatron_rank")
def test_what_is_begun_in_a_profiled_block_is_complete_after_it(monkeypatch):
    class OfTwo:
        def size(self):
            return 2

    # The recorder leaves out a rank that is alone.
    monkeypatch.setattr(between_ranks, "group_of", lambda args: OfTwo())
    kept, x = [], torch.ones(2**20)
    with BetweenRanks() as recorder:
        before = dist.all_reduce(x, async_op=True)
        with recorder.profiled() as profiler:
            dist.all_reduce(x)
            assert recorder._in_flight == []
            for begin in (dist.all_reduce, lambda x, **settings: dist.broadcast(x, 0, **settings)):
                kept.append(begin(x, async_op=True))
                assert recorder._in_flight  # the newest; those before it may be complete
            recorder._in_flight.append(late := Late())
        before.wait()
    assert late.waited and all(work.is_completed() for work in kept)
    assert recorder._in_flight is None and profiler.events()
    assert [row[0] for row in recorder.log] == ["allreduce_"] * 3 + ["broadcast_"]


class Late:
    waited = False

    def is_completed(self):
        return self.waited

    def wait(self):
        self.waited = True
