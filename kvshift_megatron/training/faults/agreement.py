"""One decision for all ranks, before and after the process groups exist."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

_store: torch.distributed.Store | None = None


def store(timeout: timedelta) -> torch.distributed.Store:
    """This package's part of the store that the ranks of the launch meet in.

    Usable before `init_process_group`, and a connection of its own, so that no call of the main
    thread keeps another thread waiting. One rank alone needs no launcher.

    Args:
        timeout: of every call; only the first call of this function decides it.
    """
    global _store
    if _store is None:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            found = torch.distributed.HashStore()
        else:
            # Where rank 0 serves the store, this server stays and Megatron's joins it.
            found, _, _ = next(torch.distributed.rendezvous("env://", timeout=timeout))
        _store = torch.distributed.PrefixStore("kvshift_megatron", found)
    return _store


def decided_by_rank_0(name: str, decide: Callable[[], Any], timeout: timedelta) -> Any:
    """What `decide` returns on rank 0, on every rank; before there is a process group.

    Args:
        name: of the decision, once a launch.
        decide: called on rank 0 only; its result has to survive JSON.
        timeout: how long the others wait for rank 0.

    Raises:
        ValueError: on every rank alike, with the words of rank 0's ValueError or OSError.
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
    """Every rank's failure, on every rank; empty where none failed. Collective over all ranks.

    Args:
        failure: of this rank, in words.
    """
    failed = torch.tensor([int(failure is not None)], device=torch.cuda.current_device())
    torch.distributed.all_reduce(failed, op=torch.distributed.ReduceOp.MAX)
    if not failed.item():
        return []
    failures = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(failures, failure)
    return [text for text in failures if text is not None]
