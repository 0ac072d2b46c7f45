"""Count a training step at torch's dispatcher, below every Python name that a call may go by."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from kvshift_megatron.planning.memory import LiveStorages
from kvshift_megatron.planning.traffic import Traffic

aten = torch.ops.aten


def _repeated(shape: torch.Size, query: torch.Size) -> tuple[int, ...]:
    """Return the shape of keys or values with the query's heads; older formulas ask for them."""
    return shape[0], query[1], *shape[2:]


# torch's FlopCounterMode has formulas only for the GPU's attention kernels.
_ATTENTION_ON_CPU: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_: sdpa_flop_count(
        q.shape, _repeated(k.shape, q.shape), _repeated(v.shape, q.shape)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_: sdpa_backward_flop_count(
            grad.shape, q.shape, _repeated(k.shape, q.shape), _repeated(v.shape, q.shape)
        )
    ),
}


class StepCounter(TorchDispatchMode):
    """Count a step's traffic, arithmetic and allocations.

    Args:
        storages: Is shown every result.

    Attributes:
        traffic: See Traffic.
        work: (during, what) -> number. `what` is matmul or attention (FLOPs by the formulas of
            torch's FlopCounterMode, attention as if nothing were masked) or elementwise (elements
            that pointwise operations return). `during` is forward, backward (including what it
            recomputes), optimizer, or schedule for everything between.
    """

    def __init__(self, storages: LiveStorages) -> None:
        super().__init__()
        self.traffic = Traffic()
        self.work: Counter[tuple[str, str]] = Counter()
        self._storages = storages
        self._during = "schedule"

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Count what runs in the block under this name."""
        before, self._during = self._during, name
        try:
            yield
        finally:
            self._during = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
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
        # This package's fused shift is an operator without torch's pointwise tag.
        if torch.Tag.pointwise in func.tags or func.namespace == "kvshift_megatron":
            self.work[during, "elementwise"] += sum(output.numel() for output in outputs)
        for output in outputs:
            self._storages.see(output)
        return result
