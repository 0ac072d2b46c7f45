"""JSON lines that outlive kills, resumes and full disks: appending them, and reading them back.

One object a line. Numbers that JSON has no word for are the strings "NaN", "Infinity" and
"-Infinity"; `read_metrics` turns them back.
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
    """Appends to a file; what cannot be written is lost after one warning, and never raises.

    Each line is one write to a file opened for appending, so that several processes can share it
    on one machine and a reader sees whole lines. A line that a killed process left unfinished is
    ended first and so stays the only one that cannot be read.

    Args:
        path: made with its folders when the first line is written.
        warn: takes a sentence; default: standard error.
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
            if self._descriptor is None:
                self._open()
            data = text.encode()
            written = os.write(self._descriptor, data)
            if written < len(data):
                raise OSError(f"only {written} of {len(data)} bytes of a line were written")
        except OSError as error:
            # Opened anew for the next line, which then ends this one if part of it is there.
            self.close()
            self.lost += 1
            if self.lost == 1:
                self._warn(
                    f"kvshift_megatron: {self.path} cannot be written ({error}): its lines are "
                    "lost until it can be again; training goes on"
                )

    def close(self) -> None:
        """Let the file go; a later `append` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")


def read_lines(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The objects of a file, in order; lines that a kill or a full disk cut off are left out."""
    with open(path, "rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def read_metrics(path: str | os.PathLike) -> dict[int, dict[str, Any]]:
    """What a run logged, by iteration.

    A resumed run writes the iterations after its checkpoint again: the last value of a name counts.

    Returns:
        iteration -> {name: value}, ascending.
    """
    metrics = {}
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
