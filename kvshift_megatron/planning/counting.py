"""The counters of a training step, at torch's dispatcher: below every Python name for a call."""

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from kvshift_megatron.planning.memory import LiveStorages
from kvshift_megatron.planning.traffic import Traffic

aten = torch.ops.aten

# torch's FlopCounterMode has formulas for the GPU's attention kernels only.
_ATTENTION_ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    ),
}


class StepCounter(TorchDispatchMode):
    """Counts a step's traffic, arithmetic and allocations.

    Args:
        storages: is told of every result.

    Attributes:
        traffic: see Traffic.
        work: (during, what) -> number; `what` is matmul and attention (FLOPs by the formulas of
            torch's FlopCounterMode, attention as if nothing were masked) or elementwise (elements
            that pointwise operations return). `during` is forward, backward (with what it
            recomputes), optimizer, or schedule for what lies between.
    """

    def __init__(self, storages: LiveStorages):
        super().__init__()
        self.traffic = Traffic()
        self.work: Counter[tuple[str, str]] = Counter()
        self._storages = storages
        self._during = "schedule"

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Names what runs in the block."""
        before, self._during = self._during, name
        try:
            yield
        finally:
            self._during = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        during = "backward" if torch._C._current_graph_task_id() != -1 else self._during
        if func.namespace == "c10d":
            self.traffic.add(func, args, during)
            return result
        packet = func.overloadpacket
        if packet in _ATTENTION_ON_CPU:
            self.work[during, "attention"] += _ATTENTION_ON_CPU[packet](*args)
        elif packet in flop_registry:
            kind = "attention" if "attention" in packet.__name__ else "matmul"
            self.work[during, kind] += flop_registry[packet](*args, **kwargs, out_val=result)
        outputs = result if isinstance(result, tuple | list) else (result,)
        outputs = [output for output in outputs if isinstance(output, Tensor)]
        # The fused shift is an operator of this package's own.
        if torch.Tag.pointwise in func.tags or func.namespace == "kvshift_megatron":
            self.work[during, "elementwise"] += sum(output.numel() for output in outputs)
        for output in outputs:
            self._storages.see(output)
        return result
