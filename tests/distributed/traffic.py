"""Counts what a layer sends: every c10d operation at torch's dispatcher, and its bytes."""

from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from kvshift_megatron.cp_exchange import HistoryExchange
from tests.distributed.cases import Case
from tests.distributed.packed import attention_of

# Which argument holds what this rank contributes; anything not listed is recorded with -1 bytes.
_CONTRIBUTES = {
    "send": 0,
    "allreduce_": 0,
    "broadcast_": 0,
    "_allgather_base_": 1,
    "_reduce_scatter_base_": 1,
}


class Recorder(TorchDispatchMode):
    """Lists (operation, peer or None, bytes), below every Python name for it.

    Between them stand ("local", None, 0) for a product over all local keys or values, and
    ("wait", None, 0) for the exchange's wait.
    """

    def __init__(self, local_elements: int):
        super().__init__()
        self.log = []
        self._local_elements = local_elements

    def __enter__(self):
        wait = HistoryExchange._wait

        def recording(exchange):
            self.log.append(("wait", None, 0))
            wait(exchange)

        self._patch = mock.patch.object(HistoryExchange, "_wait", recording)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and not name.startswith("recv"):
            size = -1
            if name in _CONTRIBUTES:
                tensors = args[_CONTRIBUTES[name]]
                tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
                size = sum(tensor.nbytes for tensor in tensors)
            self.log.append((name, args[2] if name == "send" else None, size))
        result = func(*args, **(kwargs or {}))
        # A half of the keys is the smallest piece that the local part works on.
        if name == "mul" and result.numel() >= self._local_elements // 2:
            self.log.append(("local", None, 0))
        return result


def of_one_layer(case: Case) -> list[dict]:
    """Every rank's traffic of one attention layer, by sequence length and pass."""
    attention, mine = attention_of(case), {}
    for tokens in (32, 128):
        x = torch.randn(tokens // case.cp, 2, 64, requires_grad=True)
        keys = x.size(0) * x.size(1) * case.model.num_query_groups * 8
        with Recorder(keys) as forward:
            output, _ = attention(x, attention_mask=None)
        with Recorder(keys) as backward:
            output.sum().backward()
        mine[tokens] = {"forward": forward.log, "backward": backward.log}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
