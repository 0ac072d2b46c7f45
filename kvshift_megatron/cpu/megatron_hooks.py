"""What Megatron's own functions are wrapped with, and how they are reached.

The rule for names: what is replaced in ``torch`` is replaced before Megatron is imported, so a
``from torch.cuda import ...`` in it captures the replacement. What is replaced in Megatron is
replaced the moment its module has run and before the importer goes on, so a ``from`` import
captures that too. Megatron modules that were imported earlier are searched for captured names.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from kvshift_megatron.cpu import flags
from kvshift_megatron.upstream.dataset_helpers import HELPERS

ASYNC_MODULE = "megatron.core.dist_checkpointing.strategies.async_utils"


def _caller_is(prefix: str) -> bool:
    """Whether the function that called our caller lives in a module of that name."""
    name = sys._getframe(2).f_globals.get("__name__", "")
    return name == prefix or name.startswith(prefix + ".")


def tensor_type(original: Callable) -> Callable:
    """Wraps ``Tensor.type`` to answer ``torch.cuda.FloatTensor`` to Megatron's optimizer.

    The optimizer sorts and checks parameters by these strings. Nobody else is answered so.
    """

    @functools.wraps(original)
    def type(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if not args and not kwargs and _caller_is("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return type


def device_count(original: Callable) -> Callable:
    """Wraps ``torch.cuda.device_count`` to answer 1 to two callers.

    In ``megatron.training.initialize`` it decides whether the parallel groups and the RNG tracker
    are set up at all; the process that writes checkpoints in the background divides by it.
    """

    @functools.wraps(original)
    def count() -> int:
        asked = _caller_is("megatron.training.initialize") or _caller_is(ASYNC_MODULE)
        return 1 if asked else original()

    return count


def allow_no_cuda(original: Callable) -> Callable:
    """Passes Megatron's own ``allow_no_cuda=True``."""

    @functools.wraps(original)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        kwargs["allow_no_cuda"] = True
        return original(*args, **kwargs)

    return initialize_megatron


def filled_arguments(original: Callable) -> Callable:
    """Adds the flags that a CPU needs to ``sys.argv`` when Megatron parses it."""

    @functools.wraps(original)
    def parse_args(*args: Any, **kwargs: Any) -> Any:
        sys.argv[1:] = flags.fill_flags(sys.argv[1:])
        return original(*args, **kwargs)

    return parse_args


def async_caller(original: type) -> type:
    """Derives the caller of ``--async-save``'s background process for tensors on the CPU."""

    @functools.wraps(original, updated=())
    class PersistentAsyncCaller(original):
        @classmethod
        def _get_process(cls, rank: int, mp_mode: str = "fork", *args: Any, **kwargs: Any) -> Any:
            # A process that starts afresh would not have this layer.
            return super()._get_process(rank, "fork", *args, **kwargs)

        def schedule_async_call(self, async_req: Any) -> None:
            # On a GPU the copy to the CPU is what training cannot change any more. Here there is
            # none, and the background process would write what the next step makes of the tensors.
            if async_req.preload_fn is not None:
                rank, _, *rest = async_req.async_fn_args
                buckets = [_copied(bucket) for bucket in async_req.preload_fn()]
                async_req = async_req._replace(
                    async_fn_args=(rank, buckets, *rest), preload_fn=None
                )
            super().schedule_async_call(async_req)

    return PersistentAsyncCaller


def _copied(bucket: tuple) -> tuple:
    """A write bucket of Megatron's with tensors of its own."""
    file, key, (objects, tensors) = bucket
    return file, key, (objects, [(item, tensor.clone()) for item, tensor in tensors])


def distributed_optimizer(original: type) -> type:
    """Derives the distributed optimizer that can be loaded where torch's Adam is inside it.

    Megatron's asks for the step of every parameter before there is one, looks for a step among the
    tensors of a checkpoint that has it elsewhere, gives all parameters one step to count on, and
    writes in place into fp32 parameters that record gradients.
    """

    @functools.wraps(original, updated=())
    class DistributedOptimizer(original):
        def state_dict(self) -> dict:
            _allocate_state(self.optimizer)
            return super().state_dict()

        def load_state_dict(self, state_dict: dict) -> None:
            super().load_state_dict(state_dict)
            for state in self.optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone()

        @torch.no_grad()
        def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict) -> None:
            # The step came with the parameter groups; one format brings this rank's own back here.
            super()._set_main_param_and_optimizer_states(model_param, {**tensors, "step": None})

    return DistributedOptimizer


def _allocate_state(optimizer: Any) -> None:
    """Gives torch's Adam the state that it has before its first step."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and not optimizer.state:
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            moments = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[param] = {"step": torch.tensor(0.0), **moments}


def cpu_rng_may_change(record: Any) -> bool:
    """Logging filter: here the "GPU" generator is the CPU's, so it does change."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


class MegatronFinder(importlib.abc.MetaPathFinder):
    """Runs ``after_import(module)`` when a module named in ``names`` has been executed.

    It also finds the compiled dataset helper of the installed wheel for a source checkout whose
    ``megatron`` comes first on ``sys.path`` and has not been built.
    """

    def __init__(self, names: frozenset[str], after_import: Callable[[ModuleType], None]) -> None:
        self.names = names
        self.after_import = after_import

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname == HELPERS:
            return self._find_helper(path)
        if fullname not in self.names:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:  # a module may be reloaded after the layer is off
                    self.after_import(module)

            spec.loader.exec_module = exec_module
        return spec

    @staticmethod
    def _find_helper(path: Any) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(HELPERS, path)
        if spec is None:
            elsewhere = [os.path.join(p, "megatron", "core", "datasets") for p in sys.path]
            spec = importlib.machinery.PathFinder.find_spec(HELPERS, elsewhere)
        return spec
