"""The process that Megatron keeps for the results of a save."""

import multiprocessing
import queue
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from kvshift_megatron.training.faults import processes


def _has_torch(process: int | str) -> bool:
    return "libtorch" in Path(f"/proc/{process}/maps").read_text()


def test_it_holds_results_without_importing_torch(monkeypatch):
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    before = set(multiprocessing.active_children())
    results = processes.get_write_results_queue()
    (started,) = set(multiprocessing.active_children()) - before
    result = WriteResult(MetadataIndex("weight"), size_in_bytes=3, storage_data="a file")
    results.put(result)
    assert not _has_torch(started.pid)
    assert results.get_nowait() == result
    with pytest.raises(queue.Empty):
        results.get_nowait()
    # The comparator, and what the process would do with a result that is not pickled.
    assert _has_torch("self")
    results._queue.put(result)
    assert _has_torch(started.pid)
