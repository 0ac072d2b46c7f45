"""Read the `.metadata` file of a distributed checkpoint, and check that it is one."""

from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from kvshift_megatron.utils import inert_pickle

_LARGEST = 2**62  # elements or bytes


def read_metadata(file: Path) -> Metadata:
    """Return the description of a checkpoint, with every part of the type that it should have.

    Raises:
        ValueError: The file is damaged, or holds something else; the message names it.
        OSError: The file system reports an error.
    """
    try:
        with file.open("rb") as stream:
            metadata = inert_pickle.load_metadata(stream)
    except OSError:
        raise
    # A damaged pickle can raise anything.
    except Exception as error:
        raise ValueError(f"{file} cannot be read: {first_line(error)}") from error
    if fault := _fault_of(metadata):
        raise ValueError(f"{file} does not describe a checkpoint ({fault}): copy it again")
    return metadata


def first_line(error: Exception) -> str:
    """Return the type of an error and the beginning of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no further detail'}"


def _fault_of(metadata: Any) -> str | None:
    if not isinstance(metadata, Metadata):
        return f"it holds an object of the type {type(metadata).__name__}"
    parts = getattr(metadata, "state_dict_metadata", None)
    stored = getattr(metadata, "storage_data", None)
    if not (isinstance(parts, dict) and isinstance(stored, dict)):
        return "state_dict_metadata or storage_data is not a table"
    for key, entry in parts.items():
        if not isinstance(key, str):
            return f"a key is of the type {type(key).__name__}"
        if isinstance(entry, TensorStorageMetadata):
            if not _is_tensor(entry):
                return f"{key!r} has no valid dtype, size or chunks"
        elif not isinstance(entry, BytesStorageMetadata):
            return f"{key!r} is neither a tensor nor bytes"
    for index, info in stored.items():
        if not (isinstance(index, MetadataIndex) and _is_place(info)):
            return f"storage_data of {getattr(index, 'fqn', index)!r:.100} is not a place in a file"
    return None


def _is_tensor(entry: TensorStorageMetadata) -> bool:
    properties, chunks = (getattr(entry, name, None) for name in ("properties", "chunks"))
    size = getattr(entry, "size", None)
    return (
        isinstance(properties, TensorProperties)
        and isinstance(getattr(properties, "dtype", None), torch.dtype)
        and isinstance(size, torch.Size)
        and _is_size(size)
        and isinstance(chunks, list)
        and all(_is_chunk(chunk, size) for chunk in chunks)
    )


def _is_chunk(chunk: Any, size: torch.Size) -> bool:
    offsets, sizes = getattr(chunk, "offsets", None), getattr(chunk, "sizes", None)
    return (
        isinstance(chunk, ChunkStorageMetadata)
        and all(map(_is_size, (offsets, sizes)))
        and len(chunk.offsets) == len(chunk.sizes) == len(size)
    )


def _is_size(value: Any) -> bool:
    if not isinstance(value, torch.Size):
        return False
    elements = 1
    for length in value:
        if length < 0:
            return False
        elements *= max(length, 1)
    return elements < _LARGEST


def _is_place(info: Any) -> bool:
    path, start, length = (
        getattr(info, name, None) for name in ("relative_path", "offset", "length")
    )
    return (
        isinstance(path, str)
        # Files of the checkpoint itself, not what a path could reach elsewhere.
        and not PurePosixPath(path).is_absolute()
        and ".." not in PurePosixPath(path).parts
        and all(type(one) is int and 0 <= one < _LARGEST for one in (start, length))
    )
