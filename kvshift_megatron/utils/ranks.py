"""Ask one rank, or all of them. The ranks of a plan's dry run are alone: each asks only itself."""

from collections.abc import Callable
from typing import Any

import torch


def on_rank_0(ask: Callable[[], Any]) -> Any:
    """Call `ask` on rank 0; return its answer, or raise its ValueError, on every rank."""
    if _is_dry_run():
        return ask()
    found: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            found[0] = ask()
        except ValueError as error:
            found[1] = str(error)
    torch.distributed.broadcast_object_list(found, src=0)
    if found[1] is not None:
        raise ValueError(found[1])
    return found[0]


def of_all_ranks(own: Any) -> list[Any]:
    """Return what every rank brings, by rank; collective over all of them."""
    if _is_dry_run():
        return [own]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def _is_dry_run() -> bool:
    # torch's fake process group: its collectives leave what was in memory.
    return torch.distributed.get_backend() == "fake"
