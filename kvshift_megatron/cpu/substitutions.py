"""The table of what is replaced on a CPU, and the engine that applies and reverts it.

Each row names a target, what takes its place and why. Rows under ``torch`` are applied at once;
rows under ``megatron`` when their module is imported (see ``megatron_hooks`` for the rule about
captured names). A target that the installed release does not have is left out.

``torch.cuda.is_available`` answers False, so that the data loader, ``torch.compile`` and Megatron
take their own CPU paths; it is a row only where a GPU could not be hidden. Dynamo is left as it
is: it traces through the wrappers.
"""

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch

from kvshift_megatron.cpu import devices, megatron_hooks, stand_ins
from kvshift_megatron.upstream.dataset_helpers import skip_if_built

_ABSENT = object()
_RNG_MODULE = "megatron.core.tensor_parallel.random"


@dataclass(frozen=True)
class Substitution:
    """One row: ``value`` replaces the target, or ``wrap(original)`` does."""

    target: str
    reason: str
    value: Any = None
    wrap: Callable[[Any], Any] | None = None

    @property
    def module(self) -> str:
        return self.target.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.target.rpartition(".")[2]

    @property
    def of_megatron(self) -> bool:
        return self.target.startswith("megatron.")

    def replacement(self, original: Any) -> Any:
        return self.value if self.wrap is None else self.wrap(original)


def _value(reason: str, value: Any, *targets: str) -> list[Substitution]:
    if isinstance(value, FunctionType):
        return _wrap(reason, functools.partial(_stand_in, value), *targets)
    return [Substitution(target, reason, value=value) for target in targets]


def _stand_in(function: Callable, original: Any) -> Callable:
    """Gives each row a function of its own, so that reverting knows the original by identity."""

    @functools.wraps(original)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return stand_in


def _wrap(reason: str, wrap: Callable, *targets: str) -> list[Substitution]:
    return [Substitution(target, reason, wrap=wrap) for target in targets]


# fmt: off
def table() -> list[Substitution]:
    """Builds the table. Not a constant: the factory list depends on the installed torch."""
    s, h = stand_ins, megatron_hooks
    hidden = not torch.cuda.is_available()
    return [
        # Devices
        *([] if hidden else _value("the CPU was asked for, and CUDA had already counted its GPUs",
                                   s.no, "torch.cuda.is_available")),
        *_value("used as a device argument in some 200 places", s.current_device,
                "torch.cuda.current_device"),
        *_wrap("takes device='cuda' or pin_memory=True", devices.with_cpu_device,
               *devices.factory_targets(), *devices.new_method_targets()),
        *_wrap("takes a CUDA device", devices.tensor_to, "torch.Tensor.to"),
        *_wrap("moves to the GPU; Module.cuda goes through it", devices.tensor_cuda,
               "torch.Tensor.cuda"),
        *_value("pinning needs a CUDA driver", s.same_tensor, "torch.Tensor.pin_memory"),
        *_wrap("a checkpoint may name CUDA storages", devices.load_on_cpu, "torch.load"),
        *_wrap("the optimizer checks 'torch.cuda.FloatTensor'", h.tensor_type, "torch.Tensor.type"),
        *_wrap("gates the parallel groups and the RNG tracker", h.device_count,
               "torch.cuda.device_count"),
        *_value("selects a GPU", s.nothing, "torch.cuda.set_device"),
        *_value("selects a GPU for a block", s.DeviceContext, "torch.cuda.device"),
        *_value("asked for the architecture, which a CPU has none of", s.get_device_properties,
                "torch.cuda.get_device_properties"),
        *_value("asked for the architecture, which a CPU has none of", s.get_device_capability,
                "torch.cuda.get_device_capability"),
        *_value("logged", s.get_device_name, "torch.cuda.get_device_name"),
        # Streams and events
        *_value("stays a class, as libraries annotate with it", s.Stream, "torch.cuda.Stream"),
        *_value("stays a class, as libraries annotate with it", s.Event, "torch.cuda.Event"),
        *_value("a CPU has one queue", s.current_stream,
                "torch.cuda.current_stream", "torch.cuda.default_stream"),
        *_value("a CPU has one queue", s.stream_context, "torch.cuda.stream"),
        *_value("a CPU has one queue", s.nothing, "torch.cuda.set_stream",
                "torch.Tensor.record_stream"),
        *_value("CPU work is done when the call returns", s.nothing, "torch.cuda.synchronize"),
        *_value("nothing is ever captured", s.no, "torch.cuda.is_current_stream_capturing"),
        *_value("NVTX marks GPU timelines", s.nothing, "torch.cuda.nvtx.range_push",
                "torch.cuda.nvtx.range_pop", "torch.cuda.nvtx.mark"),
        # Memory
        *_value("there is no CUDA memory to report", s.memory_stats, "torch.cuda.memory_stats"),
        *_value("there is no CUDA memory to report", s.mem_get_info, "torch.cuda.mem_get_info"),
        *_value("there is no CUDA memory to report", s.zero, "torch.cuda.device_memory_used"),
        *_value("there is no CUDA memory to manage", s.nothing, "torch.cuda.empty_cache",
                "torch.cuda.ipc_collect", "torch.cuda.reset_peak_memory_stats",
                "torch.cuda.reset_max_memory_allocated"),
        # Random numbers: the CPU's generator is the one that dropout draws from
        *_value("CPU dropout draws from the CPU generator", s.get_rng_state,
                "torch.cuda.get_rng_state", "torch.cuda.random.get_rng_state"),
        *_value("CPU dropout draws from the CPU generator", s.set_rng_state,
                "torch.cuda.set_rng_state", "torch.cuda.random.set_rng_state"),
        *_value("CPU dropout draws from the CPU generator", s.manual_seed,
                "torch.cuda.manual_seed", "torch.cuda.random.manual_seed"),
        *_value("CPU dropout draws from the CPU generator", s.initial_seed,
                "torch.cuda.initial_seed"),
        *_value("CPU dropout draws from the CPU generator", s.DEFAULT_GENERATORS,
                "torch.cuda.default_generators"),
        *_wrap("draws a seed, which must not move dropout's generator", s.own_random_numbers,
               "torch.utils.data.DataLoader.__iter__"),
        *_value("the RNG tracker sets its state in a lazy call", s.call_now,
                f"{_RNG_MODULE}._lazy_call"),
        # Megatron's start
        *_wrap("asserts CUDA unless told otherwise", h.allow_no_cuda,
               "megatron.training.initialize.initialize_megatron"),
        *_wrap("warms up with random tensors of a rank's shape, which must not move the weights",
               s.keep_random_state, "megatron.training.initialize.set_jit_fusion_options"),
        *_wrap("runs make, and a wheel has no Makefile", skip_if_built,
               "megatron.core.datasets.utils.compile_helpers"),
        *_wrap("the defaults name Transformer Engine and NCCL", h.filled_arguments,
               "megatron.training.arguments.parse_args"),
        # Checkpoints
        *_wrap("expects the state of a GPU's fused Adam", h.distributed_optimizer,
               "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"),
        *_wrap("takes the copy from the GPU for one that training cannot change", h.async_caller,
               f"{h.ASYNC_MODULE}.PersistentAsyncCaller"),
    ]
# fmt: on


class Applied:
    """The substitutions in force: how many there are, and ``undo()`` to revert them all."""

    def __init__(self) -> None:
        self._rows = table()
        self._saved: list[tuple[Any, str, Any]] = []  # owner, name, what its __dict__ held
        self._pairs: list[tuple[Any, Any]] = []  # original, replacement
        self._finder = megatron_hooks.MegatronFinder(
            frozenset(row.module for row in self._rows if row.of_megatron), self._on_import
        )

    def __len__(self) -> int:
        return len(self._rows)

    def targets(self) -> list[str]:
        """The dotted names of all rows."""
        return [row.target for row in self._rows]

    def apply(self) -> None:
        for row in self._rows:
            if not row.of_megatron:
                self._replace(resolve(row.module), row)
        for name in self._finder.names:
            if name in sys.modules:
                self._on_import(sys.modules[name])
        self._rebind({id(old): new for old, new in self._pairs})
        sys.meta_path.insert(0, self._finder)
        logging.getLogger(_RNG_MODULE).addFilter(megatron_hooks.cpu_rng_may_change)

    def undo(self) -> None:
        logging.getLogger(_RNG_MODULE).removeFilter(megatron_hooks.cpu_rng_may_change)
        sys.meta_path.remove(self._finder)
        while self._saved:
            owner, name, value = self._saved.pop()
            if value is _ABSENT:
                delattr(owner, name)  # it was inherited
            else:
                setattr(owner, name, value)
        self._rebind({id(new): old for old, new in self._pairs})
        self._pairs.clear()
        trace_rules = sys.modules.get("torch._dynamo.trace_rules")
        if trace_rules is not None:
            # Dynamo knows functions by identity; torch.distributed drops its cache the same way.
            trace_rules.clear_lru_cache()

    def _on_import(self, module: ModuleType) -> None:
        for row in self._rows:
            if row.module == module.__name__:
                self._replace(module, row)

    def _replace(self, owner: Any, row: Substitution) -> None:
        original = getattr(owner, row.name, _ABSENT)
        if original is _ABSENT:
            return
        new = row.replacement(original)
        self._saved.append((owner, row.name, vars(owner).get(row.name, _ABSENT)))
        if callable(original):
            self._pairs.append((original, new))
        setattr(owner, row.name, new)

    @staticmethod
    def _rebind(new_by_id: dict[int, Any]) -> None:
        """Exchanges the names that Megatron modules captured with ``from ... import``."""
        for module in _megatron_modules():
            for name, value in list(vars(module).items()):
                if id(value) in new_by_id:
                    setattr(module, name, new_by_id[id(value)])


def resolve(dotted: str) -> Any:
    """Finds ``torch.Tensor`` or ``torch.cuda.nvtx``: a module, or a class within one."""
    head, _, rest = dotted.partition(".")
    found: Any = importlib.import_module(head)
    for name in filter(None, rest.split(".")):
        found = getattr(found, name)
    return found


def _megatron_modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and isinstance(module, ModuleType):
            yield module
