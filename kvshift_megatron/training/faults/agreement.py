"""Decisions that all ranks share, before and after the process groups exist."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

_store: torch.distributed.Store | None = None


def store(timeout: timedelta) -> torch.distributed.Store:
    """Return this package's part of the launch's rendezvous store.

    It works before `init_process_group`. It has its own connection, so that no call of the main
    thread makes another thread wait. A single rank needs no launcher.

    Args:
        timeout: Of every call on the store; later calls of this function do not change it.
    """
    global _store
    if _store is None:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            found = torch.distributed.HashStore()
        else:
            # If rank 0 serves the store, Megatron later connects to this server.
            found, _, _ = next(torch.distributed.rendezvous("env://", timeout=timeout))
        _store = torch.distributed.PrefixStore("kvshift_megatron", found)
    return _store


def decided_by_rank_0(name: str, decide: Callable[[], Any], timeout: timedelta) -> Any:
    """Return on every rank what `decide` returns on rank 0; needs no process group.

    Args:
        name: Of the decision, unique within a launch.
        decide: Called on rank 0 only; its result has to survive JSON.
        timeout: How long the other ranks wait for rank 0.

    Raises:
        ValueError: On every rank, with the message of rank 0's ValueError or OSError.
    """
    shared = store(timeout)
    if int(os.environ.get("RANK", "0")) == 0:
        try:
            answer = {"result": decide()}
        except (ValueError, OSError) as error:
            answer = {"error": str(error)}
        shared.set(name, json.dumps(answer))
    answer = json.loads(shared.get(name))
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["result"]


def any_failed(failure: str | None) -> list[str]:
    """Return the failures of all ranks; empty if none failed. Collective over all ranks.

    Args:
        failure: A sentence about this rank's failure; None if it has none.
    """
    failed = torch.tensor([int(failure is not None)], device=torch.cuda.current_device())
    torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX)
    if not failed.item():
        return []
    failures: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(failures, failure)
    return [text for text in failures if text is not None]
