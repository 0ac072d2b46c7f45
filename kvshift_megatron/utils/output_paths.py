"""Refuse to write where something is read: an output must not be, contain or lie in an input.

Paths are compared by the files that they lead to, so that symbolic links, hard links, relative
paths, bind mounts and file systems that ignore case make no difference.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_Identity = tuple[int, int]  # device and inode
_MOST_LINKS = 40  # in a row, as in Linux
_LEVELS = 4  # of folders in an input: a link to a whole disk must not take minutes


def check_outputs(
    outputs: Iterable[Path], inputs: Iterable[Path], look_inside: bool = True
) -> None:
    """Refuse outputs whose writing would change or destroy an input; write nothing.

    Args:
        outputs: Files or folders that will be created or replaced as a whole. For a folder that
            only gets more files, give these.
        inputs: Files or folders that are read. What is missing is no input.
        look_inside: Whether to look through input folders for links that lead out of them, and for
            files that an output shares with them.

    Raises:
        ValueError: An output is, contains or lies inside an input; the message names both.
    """
    read = [path for path in map(Path, inputs) if os.path.lexists(path)]
    # Links that lead out of an input are found once, for all outputs.
    places = {path: _Places(path, look_inside) for path in read}
    for output in map(Path, outputs):
        for path, found in places.items():
            if relation := found.relation(output):
                raise ValueError(
                    f"{output} cannot be the output because it {relation} the input {path}, which "
                    "would be changed or destroyed: choose another place"
                )


def check_distinct(outputs: Iterable[Path]) -> None:
    """Refuse two output files that would be written over each other.

    Names that differ only in case count as the same: on some file systems they are.

    Raises:
        ValueError: Two outputs are the same file.
    """
    seen: dict[object, Path] = {}
    for output in outputs:
        # A file that exists has an identity, one that does not exist has only its name.
        real = os.path.realpath(output)
        for key in filter(None, (real.casefold(), _identity(real))):
            if seen.setdefault(key, output) is not output:
                raise ValueError(
                    f"{seen[key]} and {output} are the same file: give each output its own"
                )


class _Places:
    """Everything that one input consists of: its own place, and where its links lead."""

    def __init__(self, path: Path, look_inside: bool):
        self._paths: set[str] = set()
        self._files: set[_Identity] = set()
        self._add(str(path), _LEVELS if look_inside else 0)
        self._identities = {one for path in self._paths if (one := _identity(path))}
        self._above = {one for path in self._paths for one in _above(path)}

    def _add(self, path: str, levels: int) -> None:
        for place in _hops(path):
            if place in self._paths:
                return
            self._paths.add(place)
        if levels and os.path.isdir(place):
            self._look_inside(place, levels - 1)

    def _look_inside(self, folder: str, levels: int) -> None:
        try:
            device = os.stat(folder).st_dev
            entries = list(os.scandir(folder))
        except OSError:  # whoever reads the input reports it
            return
        for entry in entries:
            if entry.is_symlink():
                self._add(entry.path, levels)
            elif entry.is_dir():
                if levels:
                    self._look_inside(entry.path, levels - 1)
            elif entry.inode():
                self._files.add((device, entry.inode()))

    def relation(self, output: Path) -> str | None:
        """Return how an output touches this input, as a verb; None if it does not."""
        # The link itself and where it leads: some writers replace the one, some the other.
        for place in _hops(str(output)):
            own = None if os.path.islink(place) else _identity(place)
            if place in self._paths or own in self._identities:
                return "is"
            above = set(_above(place))
            if self._identities & above or self._paths & set(_parents(place)):
                return "lies inside"
            if own in self._files:
                return "shares a file with"
            if own in self._above or any(place in _parents(path) for path in self._paths):
                return "contains"
        return None


def _hops(path: str) -> Iterator[str]:
    """Yield the real places of a path: each link in a row, and what the last one leads to."""
    for _ in range(_MOST_LINKS):
        head, name = os.path.split(path.rstrip(os.sep) or os.sep)
        if name in ("", os.curdir, os.pardir):
            break
        place = os.path.join(os.path.realpath(head or os.curdir), name)
        yield place
        if not os.path.islink(place):
            return
        path = os.path.join(os.path.dirname(place), os.readlink(place))
    yield os.path.realpath(path)


def _identity(path: str) -> _Identity | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    # Some network file systems have no inode numbers.
    return (found.st_dev, found.st_ino) if found.st_ino else None


def _parents(path: str) -> list[str]:
    return [str(parent) for parent in Path(path).parents]


def _above(path: str) -> Iterator[_Identity]:
    for parent in _parents(path):
        if identity := _identity(parent):
            yield identity
