"""Bitwise comparison of distributed checkpoints."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Load every tensor of a checkpoint, weights and optimizer state, by key."""
    reader = dcp.FileSystemReader(directory)
    described = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in described.items()
        if hasattr(entry, "size")
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Return the keys that only one has, or whose tensors differ in any bit."""
    return sorted(
        key
        for key in one.keys() | other.keys()
        if key not in one or key not in other or not _same_bits(one[key], other[key])
    )


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    as_bytes = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*as_bytes)
