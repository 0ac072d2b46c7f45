"""Count what a rank sends: every c10d operation, its group and its bytes."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Operation -> (its name in a report, the argument that holds what this rank contributes).
_OPERATIONS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "_allgather_base_": ("all-gather", 1),
    "allgather_": ("all-gather", 1),
    "allgather_into_tensor_coalesced_": ("all-gather", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "alltoall_base_": ("all-to-all", 1),
    "alltoall_": ("all-to-all", 1),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 1),
    "send": ("send", 0),
}
# Operations in which this rank sends nothing of its own.
_SILENT = {"recv_", "recv_any_source_", "barrier", "monitored_barrier_"}

# The beginning of Megatron's name for a group -> its name in a report.
_GROUPS = (
    ("TENSOR_MODEL_PARALLEL", "TP"),
    ("CONTEXT_PARALLEL", "CP"),
    ("PIPELINE_MODEL_PARALLEL", "PP"),
    ("EMBEDDING", "embedding"),
    ("EXPERT_DATA_PARALLEL", "expert DP"),
    ("EXPERT", "EP"),
    ("DATA_PARALLEL", "DP"),
    ("INTRA_PARTIAL_DATA_PARALLEL", "DP"),
    ("INTRA_DISTRIBUTED_OPTIMIZER", "optimizer"),
    ("MODEL_PARALLEL", "model"),
)


@dataclass(frozen=True)
class Kind:
    """One row of the traffic: part of the step, group, operation and number of ranks."""

    during: str
    group: str
    operation: str
    ranks: int


class Traffic:
    """Add up the messages of a rank.

    Attributes:
        totals: Kind -> [messages, bytes that this rank contributes].
    """

    def __init__(self) -> None:
        self.totals: dict[Kind, list[int]] = defaultdict(lambda: [0, 0])

    def add(self, func: Any, args: tuple, during: str) -> None:
        """Record one operation of the c10d namespace. Groups of one rank send nothing.

        Raises:
            ValueError: The table lacks the operation, so its messages would be missing.
        """
        name = func.overloadpacket.__name__
        if name in _SILENT:
            return
        if name not in _OPERATIONS:
            raise ValueError(
                f"the torch.distributed operation {name} is not in planning/traffic.py, and a plan "
                "without its messages would be wrong: add it there"
            )
        group = group_of(args)
        if group.size() == 1:
            return
        operation, position = _OPERATIONS[name]
        tensors = _tensors(args[position])
        total = self.totals[Kind(during, group_name(group), operation, group.size())]
        total[0] += 1
        total[1] += sum(tensor.nbytes for tensor in tensors)

    def rows(self) -> list[dict]:
        """Return [{during, group, operation, ranks, messages, bytes}], in a fixed order."""
        return [
            asdict(kind) | {"messages": messages, "bytes": size}
            for kind, (messages, size) in sorted(self.totals.items(), key=lambda row: str(row[0]))
        ]


def group_of(args: tuple) -> dist.ProcessGroup:
    """Return the process group among an operation's arguments."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(argument)
            except RuntimeError:  # another class, such as the reduction
                continue
    raise ValueError("a torch.distributed operation names no process group: it cannot be counted")


def group_name(group: dist.ProcessGroup) -> str:
    """Return the report's name of a group: TP, CP, ..., or world for the default one."""
    for beginning, name in _GROUPS:
        if group.group_desc.startswith(beginning):
            return name
    return "world" if group.group_desc in ("default_pg", "undefined", "") else group.group_desc


def _tensors(argument: Any) -> list[Tensor]:
    if isinstance(argument, Tensor):
        return [argument]
    return [tensor for part in argument for tensor in _tensors(part)]
