"""Read and check the header of a safetensors file, as strictly as the public library does."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvshift_megatron.convert.formats.strict_json import parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_LIMIT = 100_000_000  # bytes of the header, as in the safetensors library


@dataclass(frozen=True)
class Entry:
    """Where one tensor is in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in bytes, from the beginning of the file
    length: int  # in bytes


def read_header(file: Path) -> dict[str, Entry]:
    """Return the tensors of a file, by name.

    Raises:
        ValueError: The file is truncated or damaged, or its tensors do not cover it exactly: they
            overlap, leave holes, or end before the file does. The message names the file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LIMIT):
            raise ValueError(f"{file} is truncated, or not a safetensors file: copy it again")
        text = stream.read(length)
    try:
        header = parse_json(text)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise ValueError(f"{file} has a damaged header ({error}): copy it again") from error
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, fields, 8 + length) for name, fields in header.items()}
    _check_cover(file, entries, 8 + length, size)
    return entries


def _entry(file: Path, name: str, fields: Any, base: int) -> Entry:
    fields = fields if isinstance(fields, dict) else {}
    shape, offsets, kind = (fields.get(key) for key in ("shape", "data_offsets", "dtype"))
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise ValueError(
            f"{file} has a damaged header (shape or data_offsets of {name!r}): copy it again"
        )
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(
            f"{file}: {name!r} has dtype {kind!r:.40}, but only {', '.join(DTYPES)} can be "
            "converted: dequantize quantized weights first"
        )
    start, end = offsets
    if end - start != math.prod(shape) * DTYPES[kind].itemsize:
        raise ValueError(f"{file} has a damaged header (wrong size of {name!r}): copy it again")
    return Entry(file, DTYPES[kind], tuple(shape), base + start, end - start)


def _are_sizes(value: Any) -> bool:
    # Larger ones are damage, and torch cannot hold them.
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**62 for one in value)


def _check_cover(file: Path, entries: dict[str, Entry], base: int, size: int) -> None:
    end = max((entry.start + entry.length for entry in entries.values()), default=base)
    if size < end:
        raise ValueError(
            f"{file} is truncated: it has {size} bytes, but its header says {end}: copy it again"
        )
    at, last = base, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].length)):
        if entry.start != at:
            fault = "overlaps with" if entry.start < at else "leaves unused bytes after"
            raise ValueError(
                f"{file} has a damaged header ({name!r} {fault} {last!r}): copy it again"
            )
        at, last = entry.start + entry.length, name
    if at != size:
        raise ValueError(
            f"{file} has a damaged header (it says {at} bytes, but the file has {size}): copy it "
            "again"
        )
