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

from kvshift_megatron.cpu import flags

_HELPER = "megatron.core.datasets.helpers_cpp"


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
    """Wraps ``torch.cuda.device_count`` to answer 1 to ``megatron.training.initialize``.

    There it decides whether the parallel groups and the RNG tracker are set up at all.
    """

    @functools.wraps(original)
    def count() -> int:
        return 1 if _caller_is("megatron.training.initialize") else original()

    return count


def allow_no_cuda(original: Callable) -> Callable:
    """Passes Megatron's own ``allow_no_cuda=True``."""

    @functools.wraps(original)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        kwargs["allow_no_cuda"] = True
        return original(*args, **kwargs)

    return initialize_megatron


def skip_if_built(original: Callable) -> Callable:
    """Runs ``make`` only when the dataset helper does not import (a wheel has no Makefile)."""

    @functools.wraps(original)
    def compile_helpers() -> None:
        if importlib.util.find_spec(_HELPER) is None:
            original()

    return compile_helpers


def filled_arguments(original: Callable) -> Callable:
    """Adds the flags that a CPU needs to ``sys.argv`` when Megatron parses it."""

    @functools.wraps(original)
    def parse_args(*args: Any, **kwargs: Any) -> Any:
        sys.argv[1:] = flags.fill_flags(sys.argv[1:])
        return original(*args, **kwargs)

    return parse_args


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
        if fullname == _HELPER:
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
        spec = importlib.machinery.PathFinder.find_spec(_HELPER, path)
        if spec is None:
            elsewhere = [os.path.join(p, "megatron", "core", "datasets") for p in sys.path]
            spec = importlib.machinery.PathFinder.find_spec(_HELPER, elsewhere)
        return spec
