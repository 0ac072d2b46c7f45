"""Folders of safetensors: read and written tensor by tensor, in plain file reads and writes.

The files are not mapped into memory: pages of a mapping count as this process's memory until the
file is closed, and here the peak is promised.
"""

import ctypes
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    length: int


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, by name.

    Raises:
        ValueError: no safetensors, a damaged file, or an index that does not fit the files; the
            message names the file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._entries: dict[str, _Entry] = {}
        for file, listed in _files(path).items():
            found = _header(file)
            if listed is not None and set(found) != listed:
                odd = sorted(set(found) ^ listed)
                raise ValueError(
                    f"{path / INDEX} and {file.name} disagree about {odd[0]} and {len(odd) - 1} "
                    "more tensors: copy the folder again, index and files together"
                )
            if twice := found.keys() & self._entries:
                raise ValueError(f"{path}: {min(twice)} is in two files")
            self._entries.update(found)

    def names(self) -> set[str]:
        """All tensors."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype."""
        return self._entries[name].dtype

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in its stored dtype and in memory of its own."""
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


def _files(path: Path) -> dict[Path, set[str] | None]:
    """Files -> the tensors that the index lists for them; None without an index."""
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder")
    index = path / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map: copy the folder again")
        files: dict[Path, set[str] | None] = {}
        for tensor, name in weight_map.items():
            if Path(name).name != name:
                raise ValueError(f"{index} names the file {name!r}, outside of its folder")
            files.setdefault(path / name, set()).add(tensor)
        for file in files:
            if not file.is_file():
                raise ValueError(f"{index} lists {file.name}, but that file is missing beside it")
        return files
    if (path / SINGLE).is_file():
        return {path / SINGLE: None}
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise ValueError(
            f"{path} holds pickled weights only, which are never loaded here: save the model as "
            "safetensors (save_pretrained of Transformers does)"
        )
    raise ValueError(f"{path} holds no {SINGLE} and no {INDEX}")


def _header(file: Path) -> dict[str, _Entry]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(f"{file} is truncated, or no safetensors file: copy it again")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: _entry(file, name, fields, 8 + length) for name, fields in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, _DtypeError):
                raise
            raise ValueError(f"{file} has a damaged header ({error}): copy it again") from error
    end = max((entry.start + entry.length for entry in entries.values()), default=0)
    if size < end:
        raise ValueError(
            f"{file} is truncated: it has {size} bytes where its header says {end}: copy it again"
        )
    return entries


class _DtypeError(ValueError):
    pass


def _entry(file: Path, name: str, fields: dict, base: int) -> _Entry:
    if fields["dtype"] not in _DTYPES:
        raise _DtypeError(
            f"{file}: {name} has dtype {fields['dtype']}: only {', '.join(_DTYPES)} can be "
            "converted (quantized weights have to be dequantized first)"
        )
    dtype, shape = _DTYPES[fields["dtype"]], tuple(fields["shape"])
    start, end = fields["data_offsets"]
    if end - start != math.prod(shape) * dtype.itemsize or min(start, *shape, 0) < 0:
        raise ValueError(f"the size of {name}")
    return _Entry(file, dtype, shape, base + start, end - start)


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    folder: Path,
    groups: list[list[Planned]],
    read: Callable[[int], tuple[Tensor, ...]],
    max_shard_size: int,
) -> None:
    """Write tensors in their order, into one file or into shards with an index.

    Args:
        folder: an existing folder.
        groups: tensors that are made together; a group is never split over two files.
        read: index of a group -> its tensors.
        max_shard_size: bytes a file, unless a single group is larger.
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
    shard, filled = [], 0
    for i, group in enumerate(groups):
        size = sum(planned.nbytes for planned in group)
        if shard and filled + size > limit:
            yield shard
            shard, filled = [], 0
        shard.append(i)
        filled += size
    yield shard


def _encoded_header(tensors: list[Planned]) -> bytes:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for planned in tensors:
        header[planned.name] = {
            "dtype": _NAMES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [offset, offset + planned.nbytes],
        }
        offset += planned.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text


def write_all(stream, data) -> None:
    """Write all of a buffer to an unbuffered file; a single call may write a part of it."""
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory. Not by way of numpy: that would pin the tensor's storage."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def read_json(file: Path) -> dict:
    """A JSON object from a file.

    Raises:
        ValueError: it is missing or no JSON object; the message names the file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return content
