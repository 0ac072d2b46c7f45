"""Append JSON lines so that they survive kills, resumes and full disks, and read them back.

Each line is one object. Numbers that JSON lacks are written as the strings "NaN", "Infinity" and
"-Infinity", which `read_metrics` converts back.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_NOT_JSON = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonLines:
    """Append to a file; lines that cannot be written are lost after one warning, never an error.

    Each line is one write to a file opened for appending, so that several processes on one machine
    can share it and a reader sees whole lines. If a killed process left an unfinished line, that
    line is ended first, so that it is the only one that cannot be read.

    Args:
        path: Created, with its folders, when the first line is written.
        warn: Takes a sentence; None prints it on standard error.
    """

    def __init__(self, path: str | os.PathLike, warn: Callable[[str], None] | None = None):
        self.path = Path(path)
        self.lost = 0
        self._warn = warn or _to_stderr
        self._descriptor: int | None = None

    def append(self, line: dict[str, Any]) -> None:
        """Write one object; its values are numbers, strings, or lists and dicts of these."""
        text = json.dumps(_plain(line), allow_nan=False) + "\n"
        try:
            descriptor = self._open() if self._descriptor is None else self._descriptor
            data = text.encode()
            written = os.write(descriptor, data)
            if written < len(data):
                raise OSError(f"only {written} of {len(data)} bytes of a line were written")
        except OSError as error:
            # The next line reopens the file, and first ends this line if part of it was written.
            self.close()
            self.lost += 1
            if self.lost == 1:
                self._warn(
                    f"kvshift_megatron: {self.path} cannot be written ({error}); training "
                    "continues, and lines are lost until the file can be written again"
                )

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        """Open the file, end an unfinished line, and return the file's descriptor."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Set before anything can fail, so that `close` closes it.
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")
        return self._descriptor


def read_lines(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, in order; skip lines that a kill or a full disk truncated."""
    with open(path, "rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def read_metrics(path: str | os.PathLike) -> dict[int, dict[str, Any]]:
    """Return what a run logged, by iteration.

    A resumed run writes the iterations after its checkpoint again: the last value of a name counts.

    Returns:
        {iteration: {name: value}}, ascending.
    """
    metrics: dict[int, dict[str, Any]] = {}
    for line in read_lines(path):
        if isinstance(line.get("iteration"), int):
            values = {name: _number(value) for name, value in line.items()}
            metrics.setdefault(line["iteration"], {}).update(values)
    return dict(sorted(metrics.items()))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else ("Infinity" if value > 0 else "-Infinity")
    return value


def _number(value: Any) -> Any:
    return _NOT_JSON.get(value, value) if isinstance(value, str) else value


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
