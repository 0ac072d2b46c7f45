"""What is alive: storages by the bytes they hold, counted once however many tensors share them.

Torch keeps one Python object for a storage as long as the storage itself lives, so `id` tells
storages apart and a weak reference says when one is freed.
"""

import weakref
from collections.abc import Iterable
from unittest import mock

import torch
from torch import Tensor


class LiveStorages:
    """Bytes of the storages that were allocated since it began and are still alive.

    Args:
        device_type: only storages there count.
        known: tensors whose storages are not counted: parameters and the like.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, device_type: str, known: Iterable[Tensor] = ()):
        self._device_type = device_type
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}
        self.now = self.peak = 0
        for tensor in known:
            self._hold(tensor.untyped_storage(), 0)

    def see(self, tensor: Tensor) -> None:
        """A tensor that an operation returned."""
        if tensor.device.type == self._device_type:
            storage = tensor.untyped_storage()
            if id(storage) not in self._sizes:
                self._hold(storage, storage.nbytes())

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage whose size was changed in place."""
        key = id(storage)
        if key in self._sizes:
            self._change(storage.nbytes() - self._sizes[key])
            self._sizes[key] = storage.nbytes()

    def _hold(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)
        self._sizes[key] = size
        self._references[key] = weakref.ref(storage, lambda _: self._released(key))
        self._change(size)

    def _released(self, key: int) -> None:
        self._change(-self._sizes.pop(key))
        del self._references[key]

    def _change(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def follow_resizes(storages: LiveStorages):
    """A context in which UntypedStorage.resize_ is told to `storages`.

    Megatron frees activations so, to recompute them later.
    """
    resize = torch.UntypedStorage.resize_

    def resize_(self, size):
        result = resize(self, size)
        storages.resized(self)
        return result

    return mock.patch.object(torch.UntypedStorage, "resize_", resize_)


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """What autograd keeps for the backward pass: unique storages that are no parameters.

    Args:
        parameters: their storages are not counted.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        self._parameters = {id(p.untyped_storage()) for p in parameters}
        self._uses: dict[int, int] = {}
        self.now = self.peak = 0
        super().__init__(self._pack, lambda kept: kept.tensor)

    def _pack(self, tensor: Tensor) -> "_Kept":
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._parameters or not size:
            return _Kept(tensor, None)
        self._uses[key] = self._uses.get(key, 0) + 1
        if self._uses[key] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        return _Kept(tensor, lambda: self._release(key, size))

    def _release(self, key: int, size: int) -> None:
        self._uses[key] -= 1
        if not self._uses[key]:
            del self._uses[key]
            self.now -= size


class _Kept:
    """A saved tensor; tells when autograd lets go of it."""

    def __init__(self, tensor: Tensor, on_release):
        self.tensor = tensor
        self._on_release = on_release

    def __del__(self):
        if self._on_release is not None:
            self._on_release()


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    return sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
