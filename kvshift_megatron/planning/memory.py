"""Count the bytes of live storages, each once however many tensors share it.

Torch keeps one Python object for a storage as long as the storage itself lives, so `id` tells
storages apart and a weak reference reports when one is freed.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kvshift_megatron.upstream import planning_table
from kvshift_megatron.upstream.substitutions import Applied


class LiveStorages:
    """Count the bytes of storages that have been seen and are still alive.

    Args:
        device_type: Only storages on such a device count.
        known: Tensors whose storages are not counted, such as parameters.

    Attributes:
        now, peak: Bytes.
    """

    def __init__(self, device_type: str, known: Iterable[Tensor] = ()):
        self._device_type = device_type
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}
        self.now = self.peak = 0
        for tensor in known:
            self._hold(tensor.untyped_storage(), 0)

    def see(self, tensor: Tensor) -> None:
        """Count a tensor that an operation returned."""
        if tensor.device.type == self._device_type:
            storage = tensor.untyped_storage()
            if id(storage) not in self._sizes:
                self._hold(storage, storage.nbytes())

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Follow a storage whose size was changed in place."""
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


def follow_resizes(storages: LiveStorages) -> Applied:
    """Return a context in which `storages` follows every UntypedStorage.resize_.

    This is how Megatron frees activations that it recomputes later.
    """

    def followed(resize: Callable) -> Callable:
        def resize_(self: torch.UntypedStorage, size: int) -> Any:
            result = resize(self, size)
            storages.resized(self)
            return result

        return resize_

    return Applied(planning_table.resizes(followed))


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Count what autograd keeps for the backward pass: unique storages other than parameters.

    Args:
        parameters: Tensors whose storages are not counted.

    Attributes:
        now, peak: Bytes.
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
    """A saved tensor; calls `on_release` when autograd frees it."""

    def __init__(self, tensor: Tensor, on_release: Callable[[], None] | None):
        self.tensor = tensor
        self._on_release = on_release

    def __del__(self) -> None:
        if self._on_release is not None:
            self._on_release()


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' storages, each counted once."""
    return sum({id(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
