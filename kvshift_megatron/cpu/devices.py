"""Rewrites CUDA devices to the CPU in the calls that take a device.

The calls are wrapped one by one, not watched by a ``TorchFunctionMode``: a mode is entered by
every torch operation, is local to its thread and makes ``torch.nn.functional`` take its slow
path, while a wrapper costs only the call that names a device. The factory functions are the
ones PyTorch itself lists for ``with torch.device(...)``; the ``*_like`` and ``new_*`` families
are added to them.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

CPU = torch.device("cpu")

_LIKE = (
    "empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like",
)  # fmt: skip
_OTHER_FACTORIES = ("normal", "from_file")
_NEW_METHODS = (
    "new", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros",
)  # fmt: skip


def cpu_device(device: Any) -> Any:
    """Answers the CPU for whatever names a CUDA device, and anything else unchanged.

    Args:
        device: ``"cuda"``, ``"cuda:1"``, ``torch.device("cuda", 1)``, a device index (``bool`` is
            not one), or a device of another kind (``"cpu"``, ``"meta"``).
    """
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return CPU if device == "cuda" or device.startswith("cuda:") else device
    if isinstance(device, int) and not isinstance(device, bool):
        return CPU  # an index means the accelerator, and there is none
    return device


def with_cpu_device(original: Callable) -> Callable:
    """Wraps a factory function or ``new_*`` method whose ``device`` is keyword-only."""

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
    """Wraps ``Tensor.to``, whose device may come first by position."""

    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            # A tensor ("like that one") or a dtype passes through cpu_device unchanged.
            return original(self, cpu_device(args[0]), *args[1:], **kwargs)
        if "device" in kwargs:
            kwargs["device"] = cpu_device(kwargs["device"])
        return original(self, **kwargs)

    return to


def tensor_cuda(original: Callable) -> Callable:
    """Makes ``Tensor.cuda`` answer the tensor itself, which is where it already lives.

    ``Module.cuda`` needs no wrapper of its own: it applies this method to each tensor.
    """

    @functools.wraps(original)
    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    return cuda


def load_on_cpu(original: Callable) -> Callable:
    """Wraps ``torch.load`` so that storages saved on a GPU come to the CPU."""

    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        location = "cpu" if map_location is None else cpu_device(map_location)
        return original(f, location, *args, **kwargs)

    return load


def factory_targets() -> Iterator[str]:
    """Yields the dotted names of the factory functions that this torch has."""
    # Asked before anything is wrapped: torch caches the answer, with the functions in it.
    from torch.utils._device import _device_constructors

    # `fft_fftfreq` and the like name C functions; their home is `torch.fft`.
    names = sorted(function.__name__ for function in _device_constructors())
    for name in (*names, *_LIKE, *_OTHER_FACTORIES):
        if name.startswith("fft_"):
            yield f"torch.fft.{name.removeprefix('fft_')}"
        elif name == "nested_tensor":
            yield "torch.nested.nested_tensor"
        else:
            yield f"torch.{name}"


def new_method_targets() -> Iterator[str]:
    """Yields the dotted names of the ``Tensor.new_*`` methods."""
    for name in _NEW_METHODS:
        yield f"torch.Tensor.{name}"
