"""The messages of a real run between its ranks, and the memory of a part of it."""

import contextlib

import torch
from torch.profiler import ProfilerActivity, profile

from kvshift_megatron.planning.traffic import group_of
from tests.distributed.traffic import Recorder


class BetweenRanks(Recorder):
    """Leaves out messages of a rank to itself, and profiles memory."""

    def __init__(self):
        super().__init__()
        self._in_flight = None  # of the profiled block

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        if group_of(args).size() == 1:
            return func(*args, **(kwargs or {}))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self._in_flight is not None:
            # Complete ones would keep their tensors, which are counted.
            self._in_flight = [work for work in self._in_flight if not work.is_completed()]
            self._in_flight += begun(func, args, result)
        return result

    @contextlib.contextmanager
    def profiled(self):
        """Profile memory for a block, and close the profiler when what it began is complete.

        A thread of gloo's ends the record of an operation. If the profiler has gone by then, that
        sometimes crashes in glibc, and parameters are gathered ahead (--overlap-param-gather).
        """
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self._in_flight = []
            try:
                yield profiler
            finally:
                for work in self._in_flight:
                    work.wait()
                self._in_flight = None


def begun(func, args: tuple, result) -> list[torch.distributed.Work]:
    """Return the collective operation that its caller does not wait for at once, if this is one."""
    names = [argument.name for argument in func._schema.arguments]
    # Not passed on if it has its default, True.
    if "async_op" not in names or not dict(zip(names, args)).get("async_op", True):
        # Others, and messages from rank to rank, are waited for by who begins them.
        return []
    parts = result if isinstance(result, tuple | list) else [result]
    return [torch.distributed.Work.unbox(x) for x in parts if isinstance(x, torch.ScriptObject)]
