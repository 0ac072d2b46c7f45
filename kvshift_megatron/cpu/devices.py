"""Rewrite CUDA devices to the CPU in the calls that take a device.

The calls are wrapped one by one, not watched by a `TorchFunctionMode`: a mode is entered by every
torch operation, is local to its thread and makes `torch.nn.functional` take its slow path, while a
wrapper costs only the call that names a device.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")


def cpu_device(device: Any) -> Any:
    """Return the CPU for whatever names a CUDA device, and anything else unchanged.

    Args:
        device: `"cuda"`, `"cuda:1"`, `torch.device("cuda", 1)`, a device index (a `bool` is none),
            or a device of another kind (`"cpu"`, `"meta"`).
    """
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return CPU if device == "cuda" or device.startswith("cuda:") else device
    if isinstance(device, int) and not isinstance(device, bool):
        return CPU  # an index names an accelerator, and there is none
    return device


def with_cpu_device(original: Callable) -> Callable:
    """Wrap a factory function or `new_*` method whose `device` is keyword-only."""

    @functools.wraps(original)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = cpu_device(device)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # pinning needs a CUDA driver
        return original(*args, **kwargs)

    return on_cpu


def tensor_to(original: Callable) -> Callable:
    """Wrap `Tensor.to`, whose device may come first by position."""

    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            # cpu_device returns a tensor (to match) or a dtype unchanged.
            return original(self, cpu_device(args[0]), *args[1:], **kwargs)
        if "device" in kwargs:
            kwargs["device"] = cpu_device(kwargs["device"])
        return original(self, **kwargs)

    return to


def tensor_cuda(original: Callable) -> Callable:
    """Make `Tensor.cuda` return the tensor itself.

    `Module.cuda` needs no wrapper of its own: it applies this method to each tensor.
    """

    @functools.wraps(original)
    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    return cuda


def load_on_cpu(original: Callable) -> Callable:
    """Wrap `torch.load` so that storages saved on a GPU are loaded on the CPU."""

    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        location = "cpu" if map_location is None else cpu_device(map_location)
        return original(f, location, *args, **kwargs)

    return load
