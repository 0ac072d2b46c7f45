"""Messages of a layer, counted at torch's dispatcher, and their times in the profiler's trace."""

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.cases import Case
from tests.distributed.packed import attention_of

# Argument with this rank's contribution. Operations that are not listed are logged with -1 bytes.
_CONTRIBUTES = {
    "send": 0,
    "allreduce_": 0,
    "broadcast_": 0,
    "_allgather_base_": 1,
    "_reduce_scatter_base_": 1,
}


class Recorder(TorchDispatchMode):
    """Log (operation, peer or None, bytes) at the dispatcher, below all Python functions."""

    def __init__(self):
        super().__init__()
        self.log = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and not name.startswith("recv"):
            size = -1
            if name in _CONTRIBUTES:
                tensors = args[_CONTRIBUTES[name]]
                tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
                size = sum(tensor.nbytes for tensor in tensors)
            self.log.append((name, args[2] if name == "send" else None, size))
        return func(*args, **(kwargs or {}))


def of_one_layer(case: Case) -> list[dict]:
    """Return all ranks' {"messages": {sequence length: {pass: log}}, "trace": {pass: events}}."""
    attention, mine = attention_of(case), {}
    for tokens in (32, 128):
        output, forward = _recorded(lambda x=_input(case, tokens): attention(x, None)[0])
        _, backward = _recorded(output.sum().backward)
        mine[tokens] = {"forward": forward, "backward": backward}
    output, forward = traced(lambda: attention(_input(case, 128), None)[0])
    _, backward = traced(output.sum().backward)
    mine = {"messages": mine, "trace": {"forward": forward, "backward": backward}}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def traced(run) -> tuple:
    """Return (result of `run`, [(name, start, end)] of the profiler's events, in microseconds)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run()
    return result, [(e.name, e.time_range.start, e.time_range.end) for e in profile.events()]


def _recorded(run) -> tuple:
    with Recorder() as recorder:
        result = run()
    return result, recorder.log


def _input(case: Case, tokens: int) -> torch.Tensor:
    return torch.randn(tokens // case.cp, 2, 64, requires_grad=True)
