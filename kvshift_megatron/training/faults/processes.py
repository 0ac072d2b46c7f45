"""End background processes together with the rank that started them, however it ends.

Saving a checkpoint starts processes (a queue's manager, a writer) that wait for their rank for
ever. torchrun ends those of the ranks that it ends, but not those of a rank that was killed.
"""

import ctypes
import multiprocessing
import multiprocessing.managers
import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import Any

from kvshift_megatron.upstream import faults_table, substitutions

_PR_SET_PDEATHSIG = 1

_async_loop: Callable | None = None  # Megatron's


def die_with_parent() -> None:
    """Have Linux kill this process as soon as the thread that started it ends."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)  # the parent has already ended


def install() -> None:
    """Replace the functions that start processes, once per process."""
    global _async_loop
    from megatron.core.dist_checkpointing.strategies import async_utils

    if _async_loop is not None:
        return
    _async_loop = async_utils.PersistentAsyncCaller.async_loop
    substitutions.apply(
        faults_table.processes(
            async_loop=staticmethod(async_loop), results_queue=get_write_results_queue
        )
    )


def async_loop(*args: Any) -> None:
    """Run Megatron's loop of the background writer's process, which ends with its rank.

    A spawned process has not called `install`.
    """
    die_with_parent()
    if _async_loop is None:
        from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

        PersistentAsyncCaller.async_loop(*args)
    else:
        _async_loop(*args)


def get_write_results_queue(mp_mode: str = "spawn") -> Any:
    """Return the queue for results of writes, like Megatron's; its process ends with the rank."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        context = multiprocessing.get_context(mp_mode)
        manager = multiprocessing.managers.SyncManager(ctx=context)
        with filesystem_async._disable_gc():
            manager.start(die_with_parent)
        substitutions.apply(faults_table.results(PickledQueue(manager.Queue())))
    return filesystem_async._results_queue


class PickledQueue:
    """A queue whose process holds its items as bytes.

    That process then need not import torch to receive them, which would take it seconds in the
    first save, and hundreds of megabytes from then on, on every rank.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, item: Any) -> None:
        """Add an item to the end."""
        self._queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        """Take the first item; raise queue.Empty if there is none."""
        return pickle.loads(self._queue.get_nowait())


def abandon() -> None:
    """End the processes of this rank without waiting for them, after the run has failed.

    Python would send them SIGTERM, which they ignore under examples/slurm, and wait for them. It
    would also wait until a reader has emptied the queues of a save, and no reader is left.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import (
        AsyncCallsQueue,
        PersistentAsyncCaller,
    )

    # torch's handler would treat the end of its data loader's workers as an error.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for queue in (
        PersistentAsyncCaller._persistent_queue,
        PersistentAsyncCaller._persistent_preload_q,
        PersistentAsyncCaller._persistent_comp_q,
    ):
        if queue is not None:
            queue.cancel_join_thread()
    if AsyncCallsQueue._persistent_caller is not None:
        AsyncCallsQueue._persistent_caller.close(abort=True)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
