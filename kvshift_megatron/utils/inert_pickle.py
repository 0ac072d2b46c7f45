"""Read the pickled parts of a Megatron checkpoint without running anything in them.

`.metadata` and the common state are pickles. Only the plain data types that PyTorch and Megatron
write there are created; Megatron's own classes become inert stand-ins, and the rest is refused.
"""

import io
import pickle
from argparse import Namespace
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import Any

import torch

_METADATA_MODULES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "Path"},
}

# Megatron's own plan classes: their content is not needed, and reading them needs no Megatron.
_INERT_IN_METADATA = ("megatron.core.dist_checkpointing.strategies.", "nvidia_resiliency_ext.")

# What Megatron's training loop stores besides the weights (its own list of safe classes).
_INERT_IN_COMMON = ("megatron.", "signal.", "numpy.")
_COMMON_CLASSES: list[Any] = [Namespace, SimpleNamespace, PosixPath, io.BytesIO]


class _Inert:
    """A stand-in for an object of a class that is not imported; it does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.arguments = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.arguments}"


def _inert(name: str) -> type:
    return type(name.rpartition(".")[2], (_Inert,), {})


class ForbiddenNameError(pickle.UnpicklingError):
    """A pickle asks for something that has no place in it; nothing of it was run."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib._local":  # Python 3.13's name
            module = "pathlib"
        if name in _METADATA_MODULES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith(_INERT_IN_METADATA):
            return _inert(name)
        raise ForbiddenNameError(
            f"it wants to load {module}.{name}, which has no place in a checkpoint's metadata"
        )


def load_metadata(stream: io.BufferedIOBase) -> Any:
    """Read the `.metadata` file of a distributed checkpoint; the caller checks what it holds.

    Raises:
        ForbiddenNameError: It names something that has no place in a checkpoint's description.
        Exception: Of any kind, if it is damaged.
    """
    return _MetadataUnpickler(stream).load()


def allowed(classes: Iterable[Any]) -> AbstractContextManager:
    """Return a context in which `torch.load` takes these classes too.

    torch's own forbids all of them afterwards, also those that Megatron had allowed before.
    """
    known = torch.serialization.get_safe_globals()
    return torch.serialization.safe_globals([cls for cls in classes if cls not in known])


def load_common(source: Path | io.BytesIO, name: str) -> Any:
    """Read Megatron's common state (`common.pt`, or the shard that replaced it).

    Args:
        source: A file, or its content.
        name: Name of the file or shard, for messages.

    Raises:
        ValueError: It is damaged, or holds an object that is neither plain data nor Megatron's own.
    """
    try:
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(source)
        _rewind(source)
        inert = [(_inert(full), full) for full in needed if full.startswith(_INERT_IN_COMMON)]
        with allowed([*_COMMON_CLASSES, *inert]):
            return torch.load(source, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # A damaged pickle can raise anything.
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), None)
        reason = reason or str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} cannot be read as plain data ({reason.strip()}): it is damaged, or holds "
            "objects that are not Megatron's; nothing of it was run"
        ) from error


def _rewind(source: Path | io.BytesIO) -> None:
    if isinstance(source, io.BytesIO):
        source.seek(0)
