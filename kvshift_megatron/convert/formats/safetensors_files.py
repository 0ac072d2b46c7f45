"""Read and write folders of safetensors tensor by tensor, with plain file reads and writes.

The files are not mapped into memory: mapped pages count as this process's memory until the file is
closed, and the converter promises a low peak.
"""

import ctypes
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kvshift_megatron.convert.formats.safetensors_header import DTYPES, Entry, read_header
from kvshift_megatron.convert.formats.strict_json import read_json

__all__ = ["INDEX", "SINGLE", "Planned", "SafetensorsFolder", "read_json", "write_all",
           "write_safetensors"]  # fmt: skip
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, by name.

    Raises:
        ValueError: There is no safetensors file, a file is damaged, or the index does not fit the
            files; the message names the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._entries: dict[str, Entry] = {}
        for file, listed in _files(path).items():
            found = read_header(file)
            if listed is not None and set(found) != listed:
                disputed = sorted(set(found) ^ listed)
                raise ValueError(
                    f"{path / INDEX} and {file.name} disagree about {disputed[0]} and "
                    f"{len(disputed) - 1} more tensors: copy the folder again, index and files "
                    "together"
                )
            if twice := found.keys() & self._entries:
                raise ValueError(f"{path}: {min(twice)} is in two files")
            self._entries.update(found)

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the stored shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor."""
        return self._entries[name].dtype

    def read(self, name: str) -> Tensor:
        """Read one tensor to the CPU, in its stored dtype and in its own memory."""
        entry = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.start)
            view = _bytes(tensor)
            done = 0
            while done < len(view):
                # One call reads at most 2 GiB.
                count = stream.readinto(view[done:])
                if not count:
                    raise ValueError(f"{entry.file} ends in the middle of {name}: copy it again")
                done += count
        return tensor


def _files(path: Path) -> Mapping[Path, set[str] | None]:
    """Map each file to the tensors that the index lists for it; to None without an index."""
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder")
    index = path / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map: copy the folder again")
        listed: dict[Path, set[str]] = {}
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or not name or Path(name).name != name:
                raise ValueError(
                    f"{index}: weight_map names {name!r:.200} for {tensor!r}, which is not a file "
                    "in its folder: copy the folder again"
                )
            listed.setdefault(path / name, set()).add(tensor)
        for file in listed:
            if not file.is_file():
                raise ValueError(f"{index} lists {file.name}, but that file is missing beside it")
        return listed
    if (path / SINGLE).is_file():
        return {path / SINGLE: None}
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise ValueError(
            f"{path} holds pickled weights only, which are never loaded here: save the model as "
            "safetensors (save_pretrained of Transformers does)"
        )
    raise ValueError(f"{path} holds neither {SINGLE} nor {INDEX}")


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    folder: Path,
    groups: list[list[Planned]],
    read: Callable[[int], tuple[Tensor, ...]],
    max_shard_size: int,
) -> None:
    """Write tensors in their order, into one file or into shards with an index.

    Args:
        folder: An existing folder.
        groups: Tensors that are made together; a group is never split over two files.
        read: Returns the tensors of a group, by its index.
        max_shard_size: Bytes per file, unless a single group is larger.
    """
    shards = list(_shards(groups, max_shard_size))
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        with (folder / name).open("wb", buffering=0) as stream:
            write_all(stream, _encoded_header([one for i in shard for one in groups[i]]))
            for i in shard:
                for planned, tensor in zip(groups[i], read(i), strict=True):
                    assert tensor.shape == planned.shape, (planned, tensor.shape)
                    assert tensor.dtype == planned.dtype, (planned, tensor.dtype)
                    tensor = tensor.contiguous()
                    write_all(stream, _bytes(tensor))
            os.fsync(stream.fileno())
    if len(shards) > 1:
        weight_map = {
            planned.name: name
            for name, shard in zip(names, shards)
            for i in shard
            for planned in groups[i]
        }
        total = sum(planned.nbytes for group in groups for planned in group)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(groups: list[list[Planned]], limit: int) -> Iterator[list[int]]:
    shard: list[int] = []
    filled = 0
    for i, group in enumerate(groups):
        size = sum(planned.nbytes for planned in group)
        if shard and filled + size > limit:
            yield shard
            shard, filled = [], 0
        shard.append(i)
        filled += size
    yield shard


def _encoded_header(tensors: list[Planned]) -> bytes:
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for planned in tensors:
        header[planned.name] = {
            "dtype": _NAMES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [offset, offset + planned.nbytes],
        }
        offset += planned.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    return len(text).to_bytes(8, "little") + text


def write_all(stream: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of a buffer to an unbuffered file: a single `write` may write only a part."""
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def _bytes(tensor: Tensor) -> memoryview:
    """Return a contiguous tensor's memory. Not through numpy, which would pin its storage."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
