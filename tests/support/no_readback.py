"""Proof that device tensors are not read back: every way to do so raises, even on a CPU."""

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READING_METHODS = (
    "__bool__", "__float__", "__index__", "__int__", "cpu", "item", "nonzero", "numpy", "tolist",
)  # fmt: skip
_READING_OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave")


class ReadBack(Exception):
    """The host read a tensor's values, for which it must wait for the device."""


class _Watch(TorchDispatchMode):
    """Catch what torch's own code reads without calling a method of Tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in _READING_OPERATORS:
            raise ReadBack(name)
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if any(i is not None and i.dtype == torch.bool for i in indices):
            raise ReadBack(f"{name} with a mask")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_readback():
    """Raise ReadBack if the body reads a tensor's values on the host."""

    def forbid(name):
        def method(*args, **kwargs):
            raise ReadBack(name)

        return method

    with _Watch(), mock.patch.multiple(torch.Tensor, **{n: forbid(n) for n in _READING_METHODS}):
        yield
